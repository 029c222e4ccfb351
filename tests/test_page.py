"The page of a scan, used in a browser as a reader would."

import numpy as np
import pytest

from w2r2.scans.page import DrawnBox, scene_page
from w2r2.scans.scan import Scan
from w2r2.shipped import DATA

DARK = """(canvas => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return data.filter((value, i) => i % 4 === 3 && value > 0).length;
})"""


@pytest.mark.parametrize("width", [1300, 390])
def test_a_page_in_a_browser(tab, tmp_path, width):
    from browser import wait

    with Scan(DATA / "samples", "scene9000_00") as scan:
        box = dict(zip(scan.object_ids.tolist(), scan.boxes))
        drawn = [
            DrawnBox("fused", box[8], "the <b>couch</b>", "2D and 3D"),
            DrawnBox("2d", box[16], "the lamp", "2D only"),
        ]
        drawn += [DrawnBox("candidate", b) for b in scan.boxes] + [DrawnBox("fused", np.full(6, np.nan), "nothing")]
        page = scene_page(scan, tmp_path / "page.html", drawn)
    tab.open(page.as_uri(), width=width, height=900)
    wait(lambda: tab.run(f"{DARK}(document.getElementById('over')) > 100"), "the box was not drawn over the scene")
    few = tab.run(f"{DARK}(document.getElementById('over'))")
    assert (
        tab.run("[...document.querySelectorAll('#said button')].map(b => b.textContent).join('|')")
        == "the <b>couch</b>|the lamp|nothing"
    )
    tab.run("document.querySelectorAll('#layers input')[2].click()")  # candidates
    assert tab.run(f"{DARK}(document.getElementById('over'))") > 2 * few
    tab.run("document.querySelectorAll('#layers input')[2].click()")
    shown = "[...document.querySelectorAll('#views figure')].map(f => +f.classList.contains('shows')).join('')"
    couch = tab.run(shown)
    tab.run("document.querySelectorAll('#said button')[1].click()")
    assert tab.run(shown) != couch and "1" in couch, "another description is shown by other views"
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert not tab.complaints and all(url.startswith(("file:", "data:", "blob:")) for url in tab.requests)
