"""Offline half: make and prepare data, train with PASSION, evaluate, predict."""
