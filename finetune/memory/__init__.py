"""Memory of a training run: what it will take, what to change so that it fits, and what a card says meanwhile.

`sizes` reads a model's shape from its config.json, `estimate` adds up a run's parts, `advice` looks for settings that
fit a card, `tables` prints both, `devices` asks the driver, `watch` keeps asking and writes it down.
"""
