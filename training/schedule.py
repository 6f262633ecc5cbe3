"""The learning rate schedule."""


def polynomial(base: float, epoch: int, epochs: int, power: float = 0.9) -> float:
    """base * (1 - epoch / epochs)^power for epoch from 0, rounded to 8 decimals as released."""
    return round(base * float((1 - epoch / epochs) ** power), 8)
