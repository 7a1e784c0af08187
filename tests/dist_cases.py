"""Where, and how, the jobs of `tests/faults` fail; see `dist_faults.fail` for the values."""

from __future__ import annotations

IN_THE_PIPELINE = {
    ("forward", 0): "forward",
    ("forward", 1): "forward",
    ("forward", 2): "forward",
    ("recompute", 0): "recompute",
    ("recompute", 1): "recompute",
    ("backward", 0): "backward",
    ("backward", 1): "backward",
    ("backward", 2): "backward",
    ("optimizer", 0): "update",
    ("optimizer", 1): "update",
    ("optimizer", 2): "update",
    ("loss", 2): "forward",
    ("data", 0): "load",
    ("loader process", 0): "load",
    ("evaluation", 0): "evaluation",
    ("evaluation", 1): "evaluation",
    ("metric", 2): "evaluation",
}
"""Place and stage of an exception, and the action that its report names."""

OUTSIDE = [
    *(("before the pipeline", stage) for stage in range(3)),
    *(("endless loop", stage) for stage in range(3)),
    *(("while the others wait for all", stage) for stage in range(3)),
    ("loop over a loader", 0),
    ("at the end", 1),
]
"""Place and stage of exceptions in code of the user's that no pipeline calls."""

MISUSE = {"another drain": ("another drain", 1)}

EXITS = {
    "exit with code 3": ("forward", 1, "exit"),
    "exit with a text": ("endless loop", 2, "exit with a text"),
    "exit with code 0": ("at the end", 1, "exit well"),
    "exit amid the work": ("forward", 1, "vanish"),
}

STARTS = {
    "one never starts": ("before the pipeline", 1, "wait for ever", 60.0, 6.0),
    "one is another version": ("before the pipeline", 2, "be another version"),
}

SIGNALS = {
    **{f"kill stage {stage}": ("forward", stage, "kill") for stage in range(3)},
    "kill in the loader": ("data", 0, "kill"),
    "kill between two steps": ("loop", 1, "kill"),
    **{f"stop stage {stage}": ("forward", stage, "stop", 2.5) for stage in range(3)},
    "terminate stage 1": ("forward", 1, "terminate"),
    "interrupt": ("loop over a loader", 0, "interrupt"),
    "kill parent": ("loop over a loader", 0, "kill parent"),
    "terminate parent": ("endless loop", 1, "terminate parent"),
    "kill parent before the workers meet": ("before the pipeline", 1, "kill parent"),
}
