"""Read a file with little memory: python limited.py READER PATH. Prints what became of it, the memory [bytes] that it
took, and the seconds."""

import json
import os
import resource
import sys
import time
from pathlib import Path

from w2r2.metrics.prediction_files import load_predictions
from w2r2.model.fields import read_field
from w2r2.scans.annotations import LabelImages, LabelTable, read_aggregation, read_scene_info, read_segments, read_split
from w2r2.scans.frames import FrameFolder, read_matrix
from w2r2.scans.ply import read_ply
from w2r2.scans.sens import Sens
from w2r2.tasks.proposals import read_proposals
from w2r2.tasks.record_files import read_conversations
from w2r2.tasks.samples import read_scanqa, read_scanrefer


def frames(sequence):
    "All images of a recording."
    with sequence:
        return [(frame.color, frame.depth) for frame in sequence]


READERS = {
    "scene": read_scene_info,
    "segments": read_segments,
    "aggregation": read_aggregation,
    "labels": LabelTable.read,
    "split": read_split,
    "matrix": read_matrix,
    "instances": lambda path: [image.sum() for image in LabelImages(path).values()],
    "sens": lambda path: frames(Sens(path)),
    "folder": lambda path: frames(FrameFolder(path)),
    "mesh": read_ply,
    "proposals": read_proposals,
    "scanrefer": read_scanrefer,
    "scanqa": read_scanqa,
    "grounding": lambda path: load_predictions(path, "scanrefer", "scanrefer"),
    "captions": lambda path: load_predictions(path, "scan2cap", "scan2cap"),
    "answers": lambda path: load_predictions(path, "scanqa", "scanqa"),
    "field": read_field,
    "records": read_conversations,
}


def allowed(path: Path) -> int:
    "Bytes that a reader may need: ten times the file, and 64 MB."
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return 10 * sum(file.stat().st_size for file in files) + 2**26


def address_space() -> int:
    "Bytes that the process has asked for."
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def resident(which: str = "VmRSS") -> int:
    "Bytes of memory that the process uses; VmHWM: the most since `forget_peak`."
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def root_of(error: BaseException) -> BaseException:
    "The error itself, or the `MemoryError` that it tells in other words."
    told = error
    while told is not None and not isinstance(told, MemoryError):
        told = told.__context__
    return told or error


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    read, path = READERS[sys.argv[1]], Path(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + allowed(path), hard))
    forget_peak()
    before, start = resident(), time.process_time()
    try:
        read(path)
        said = ["read", ""]
    except Exception as error:
        said = [type(root_of(error)).__name__, str(error)]
    print(json.dumps([*said, resident("VmHWM") - before, time.process_time() - start]))
