"""Functions that tests name as judges."""


def one(prompt, first, second):
    """Prefers "one …", as candidates of the tests have it."""
    return 1.0 if first.startswith("one") else 0.0


def first_shown(prompt, first, second):
    return 1.0


def length(prompt, response):
    return len(response)


def unsure(prompt, first, second):
    return 0.75 if first.startswith("one") else 0.25


def raises_at_2(prompt, first, second):
    if prompt == "Question 2?":
        raise RuntimeError("no idea")
    return 0.5


def too_large(prompt, first, second):
    return 3


def text(prompt, response):
    return "good"


def alone(prompt):
    return 0


constant = 7
