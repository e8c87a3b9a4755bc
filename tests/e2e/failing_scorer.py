"""A user's scorer with a fault in it."""


def score(completion: str, answer: str) -> bool:
    raise ZeroDivisionError("the user's scorer failed")
