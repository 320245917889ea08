"""The parts of a training run: passes, loss, log, table, saving."""
