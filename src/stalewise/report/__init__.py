"""What a run did, for people: its timeline, a trace for Perfetto, and a page that explains it."""

from stalewise.report.chrome_trace import write_chrome_trace
from stalewise.report.html import write_report
from stalewise.report.run_folder import RunFolder
from stalewise.report.timeline import Activity, StageUsage, Timeline, Usage, Window

__all__ = [
    "Activity",
    "RunFolder",
    "StageUsage",
    "Timeline",
    "Usage",
    "Window",
    "write_chrome_trace",
    "write_report",
]
