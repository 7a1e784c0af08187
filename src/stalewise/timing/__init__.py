"""How long a program takes, without running it: exact timetables, steady step times, and random costs."""

from stalewise.timing.costs import LinkCost, Links, StepCosts
from stalewise.timing.cycle import Cycle
from stalewise.timing.outcome import Outcome, simulate
from stalewise.timing.timetable import TimedProgram, Timetable

__all__ = ["Cycle", "LinkCost", "Links", "Outcome", "StepCosts", "TimedProgram", "Timetable", "simulate"]
