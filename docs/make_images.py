"""Make the pictures that the documents show, from the folder of a run.

make train ARGS="--out runs/readme" && python docs/make_images.py runs/readme
"""

import sys
from pathlib import Path

from stalewise.report import Timeline
from stalewise.report.figures import followed_batch, timeline_picture

folder = Path(sys.argv[1])
timeline = Timeline.load(folder)
target = Path(__file__).parent / "images" / "timeline.svg"
target.parent.mkdir(exist_ok=True)
window = timeline.window()
svg = timeline_picture(timeline, window, batch=followed_batch(timeline, window))
if "xmlns=" not in svg.split(">")[0]:
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
target.write_text(svg, encoding="utf-8")
print(target)
