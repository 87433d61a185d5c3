"""Rewards of somebody who gives them to the command line by file and name; two of the names are no use."""


def count_c(completions, **kwargs):
    return [float(c.split().count("c")) for c in completions]


def count_b(completions, suffix, **kwargs):
    return [float(c.split().count(s)) for c, s in zip(completions, suffix)]


def broken(completions, **kwargs):
    raise KeyError("no such thing")


number = 3
