"""Words that exercises are about: few, so that a small model meets each of them often."""

NAMES = (
    "Ada", "Carl", "Dora", "Emil", "Finn", "Hugo", "Ida", "Kim", "Max", "Nora", "Otto", "Zoe",
)  # fmt: skip
CITIES = (
    "Bern", "Cairo", "Delhi", "Hanoi", "Kyiv", "Lagos", "Lima", "Oslo", "Paris", "Riga", "Rome",
    "Tokyo",
)  # fmt: skip
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "keys", "pens", "plums", "stones")
COLORS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
LETTERS = "abcdefghijklmnop"
