"""Question and answer rows on nutrition and training, from figures and formulas; the same seed gives the same bytes.

    python -m data.samples.make_fitness --train 5000 --validation 800 --output data/raw

Every number in an answer is from nutrition_figures.csv (origin and licence beside it) or computed from the numbers in
the question. No question occurs twice, and none of the validation rows in the training rows.
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Callable
from pathlib import Path

from finetune.errors import UserError, one_line_errors
from finetune.files import json_lines, write_together
from finetune.flags.types import FlagParser, positive_int

FIGURES = Path(__file__).with_name("nutrition_figures.csv")
NAMES = ("qa_fitness_nutrition_train.jsonl", "qa_fitness_nutrition_val.jsonl")
NUTRIENTS = {
    "energy_kcal": ("energy", "kcal"), "protein_g": ("protein", "g"), "fat_g": ("fat", "g"),
    "carbohydrate_g": ("carbohydrate", "g"), "fibre_g": ("fibre", "g"), "calcium_mg": ("calcium", "mg"),
    "iron_mg": ("iron", "mg"), "magnesium_mg": ("magnesium", "mg"), "potassium_mg": ("potassium", "mg"),
    "vitamin_c_mg": ("vitamin C", "mg"), "folate_ug": ("folate", "µg"),
}  # fmt: skip
ASK_AMOUNT = (
    "How much {nutrient} is in {grams} g of {food}?", "What is the {nutrient} content of {grams} g of {food}?",
    "I eat {grams} g of {food}. How much {nutrient} do I get?",
)  # fmt: skip
ASK_MORE = (
    "Which has more {nutrient}, {food} or {other}?", "Is {food} or {other} the better source of {nutrient}?",
    "{food} or {other}: where do I get more {nutrient} for the same weight?",
)  # fmt: skip
ASK_NEEDED = (
    "How much {food} gives me {amount} {unit} of {nutrient}?",
    "I want {amount} {unit} of {nutrient} from {food}. How many grams are that?",
)
Row = tuple[str, str]


class Questions:
    """Random questions with their answers."""

    def __init__(self, foods: list[dict[str, str]], rng: random.Random):
        self.foods, self.rng = foods, rng
        self.kinds: list[Callable[[], Row]] = [
            *[self.amount] * 5, *[self.comparison] * 4, *[self.needed] * 3, self.mass_index, self.heart_rate,
            self.one_repetition, self.protein_target, self.energy_of_macros,
        ]  # fmt: skip

    def draw(self) -> Row:
        """A question and its answer."""
        return self.rng.choice(self.kinds)()

    def _food(self) -> dict[str, str]:
        return self.rng.choice(self.foods)

    def amount(self) -> Row:
        column, (nutrient, unit) = self.rng.choice(list(NUTRIENTS.items()))
        food, grams = self._food(), self.rng.choice((50, 80, 100, 125, 150, 200, 250, 300))
        per_100 = float(food[column])
        total = _number(per_100 * grams / 100)
        name = food["food"]
        question = self.rng.choice(ASK_AMOUNT).format(nutrient=nutrient, food=name, grams=grams)
        if grams == 100:
            return question, f"100 g of {name} have {total} {unit} of {nutrient}."
        answer = f"{grams} g of {name} have about {total} {unit} of {nutrient}: {_number(per_100)} {unit} per 100 g."
        return question, answer

    def comparison(self) -> Row:
        column, (nutrient, unit) = self.rng.choice(list(NUTRIENTS.items()))
        food, other = self.rng.sample(self.foods, 2)
        first, second = float(food[column]), float(other[column])
        names = {"food": food["food"], "other": other["food"]}
        question = _sentence(self.rng.choice(ASK_MORE).format(nutrient=nutrient, **names))
        figures = f"{_number(first)} against {_number(second)} {unit} per 100 g"
        if first == second:
            return question, f"Both have the same: {_number(first)} {unit} of {nutrient} per 100 g."
        winner = names["food"] if first > second else names["other"]
        order = f"{names['food']} compared with {names['other']}"
        return question, _sentence(f"{winner} has more {nutrient}: {figures} ({order}).")

    def needed(self) -> Row:
        column, (nutrient, unit) = self.rng.choice(list(NUTRIENTS.items()))
        food = self._food()
        while float(food[column]) <= 0:
            food = self._food()
        per_100 = float(food[column])
        amount = max(1, round(per_100 * self.rng.choice((0.5, 0.75, 1.5, 2, 2.5))))
        name = food["food"]
        question = self.rng.choice(ASK_NEEDED).format(nutrient=nutrient, unit=unit, amount=amount, food=name)
        grams = round(100 * amount / per_100)
        return question, f"About {grams} g: {name} has {_number(per_100)} {unit} of {nutrient} per 100 g."

    def mass_index(self) -> Row:
        weight, height = self.rng.randint(45, 120), self.rng.randint(150, 200)
        value = weight / (height / 100) ** 2
        question = f"What is my body mass index at {weight} kg and {height} cm?"
        return question, f"It is {value:.1f} kg/m²: {weight} kg divided by the square of {height / 100:.2f} m."

    def heart_rate(self) -> Row:
        """Tanaka, Monahan and Seals (2001): 208 - 0.7 x age."""
        age, share = self.rng.randint(18, 75), self.rng.choice((60, 65, 70, 75, 80, 85))
        highest = 208 - 0.7 * age
        question = f"Which heart rate is {share}% of the maximum at the age of {age}?"
        answer = (
            f"About {highest * share / 100:.0f} beats a minute. The maximum is estimated as 208 - 0.7 x age, "
            f"which gives {highest:.0f}; single people differ from it."
        )
        return question, answer

    def one_repetition(self) -> Row:
        """Epley (1985): weight x (1 + repetitions / 30)."""
        weight, times = self.rng.randrange(20, 161, 5), self.rng.randint(2, 10)
        question = f"I lift {weight} kg {times} times. What is my one-repetition maximum?"
        return (
            question,
            f"About {weight * (1 + times / 30):.0f} kg by Epley's formula, weight x (1 + repetitions / 30).",
        )

    def protein_target(self) -> Row:
        weight, rate = self.rng.randint(45, 120), self.rng.choice(("0.8", "1.2", "1.6", "2.0"))
        question = f"How much protein a day is {rate} g per kg of body weight at {weight} kg?"
        return question, f"{float(rate) * weight:.0f} g a day: {rate} g x {weight} kg."

    def energy_of_macros(self) -> Row:
        """Atwater's factors: 4 kcal per gram of protein and carbohydrate, 9 per gram of fat."""
        protein, carbohydrate, fat = (self.rng.randint(5, 60) for _ in range(3))
        question = f"How much energy is in {protein} g protein, {carbohydrate} g carbohydrate and {fat} g fat?"
        total = 4 * protein + 4 * carbohydrate + 9 * fat
        return question, f"{total} kcal: 4 kcal per gram of protein and of carbohydrate, 9 kcal per gram of fat."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows {"question", "answer"} with different questions. UserError when there are not so many."""
    with FIGURES.open(encoding="utf-8", newline="") as file:
        foods = list(csv.DictReader(file))
    questions = Questions(foods, random.Random(seed))
    rows: dict[str, str] = {}
    for _ in range(20 * count):
        question, answer = questions.draw()
        rows.setdefault(question, answer)
        if len(rows) == count:
            return [{"question": question, "answer": answer} for question, answer in rows.items()]
    raise UserError(f"{count} different questions were asked for, and only {len(rows)} were found; ask for fewer")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Write the two files."""
    parser = FlagParser(prog="python -m data.samples.make_fitness", description=__doc__)
    parser.add_argument("--train", type=positive_int, default=5000, metavar="N", help="training rows")
    parser.add_argument("--validation", type=positive_int, default=800, metavar="N", help="validation rows")
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same bytes")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the two files")
    args = parser.parse_args(argv)
    rows = make_rows(args.train + args.validation, args.seed)
    parts = rows[: args.train], rows[args.train :]
    files = {args.output / name: part for name, part in zip(NAMES, parts, strict=True)}
    write_together({path: json_lines(part).encode() for path, part in files.items()})
    for path, part in files.items():
        print(f"{path}: {len(part)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
