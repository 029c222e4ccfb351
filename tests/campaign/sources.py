"The readers of recordings from elsewhere: what is damaged, and what an independent reading of it says."

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from campaign.mutators import on_bytes, on_json, on_lines, on_numbers
from campaign.targets import ALL, SAMPLES, SCENE, Target, store_files, strict, told
from PIL import Image
from scipy.spatial.transform import Rotation

from w2r2.scans.cameras import invert_rigid, resize_intrinsic
from w2r2.scans.colmap import read_colmap
from w2r2.scans.imports import import_recording, in_metres
from w2r2.scans.posed import PosedImage, from_opencv, read_color, read_depth, rectified
from w2r2.scans.scan import Scan
from w2r2.scans.sources import read_arkit, read_nerfstudio, read_posed_folder, read_tum

VIEWS, SIZE, STEP = 4, (40, 30), 0.1  # images of an original, their size [pixels], seconds between them
PARTS = "pose", "camera", "color", "depth"  # what is read of an image


# Writing a sample scene in each of the formats


def sample_views() -> tuple[list[tuple], np.ndarray]:
    "Name, colour, depth seen by the colour camera [mm] and pose of each view; the camera (4, 4)."
    with Scan(SAMPLES, SCENE) as scan:
        header, rows = scan.frames.header, []
        K = resize_intrinsic(scan.intrinsic_color, header.color_size, SIZE)
        depth_camera = PosedImage(Path(), np.eye(4), scan.intrinsic_depth, header.depth_size)
        for number, view in zip(range(VIEWS), scan.views()):
            color = np.array(Image.fromarray(view.color).resize(SIZE, Image.Resampling.BOX))
            rows.append((f"{number:03d}", color, rectified(view.depth, depth_camera, K, SIZE, nearest=True), view.pose))
        return rows, K


def words(numbers) -> str:
    return " ".join(repr(float(number)) for number in np.ravel(numbers))


def time_of(name: str) -> float:
    return 1001 + STEP * int(name)


def write_images(folder: Path, rows, color: str, depth: str = "", unit: int = 1):
    "Colour, and depth if it has a pattern for its files."
    for name, *pictures, _ in rows:
        for pattern, picture in zip((color, depth), (pictures[0], (pictures[1] * unit).astype(np.uint16))):
            if pattern:
                path = folder / pattern.format(name=name, time=time_of(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)


def write_posed(folder: Path, rows, K):
    write_images(folder, rows, "images/{name}.png", "depth/{name}.png")
    (folder / "poses").mkdir()
    for name, *_, pose in rows:
        (folder / f"poses/{name}.txt").write_text("\n".join(map(words, pose)) + "\n")
    (folder / "intrinsics.txt").write_text("\n".join(map(words, K[:3, :3])) + "\n")


def write_nerfstudio(folder: Path, rows, K):
    write_images(folder, rows, "images/{name}.png", "depths/{name}.png")
    said = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2] + 0.5, "cy": K[1, 2] + 0.5, "w": SIZE[0], "h": SIZE[1]}
    said |= {"camera_model": "OPENCV", "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0, "frames": []}
    for name, *_, pose in rows:
        named = {"file_path": f"images/{name}.png", "depth_file_path": f"depths/{name}.png"}
        said["frames"].append(named | {"transform_matrix": from_opencv(pose, "opengl-c2w").tolist()})
    (folder / "transforms.json").write_text(json.dumps(said))


def write_tum(folder: Path, rows, K):
    write_images(folder, rows, "rgb/{time:.6f}.png", "depth/{time:.6f}.png", 5)
    for part, late in (("rgb", 0), ("depth", 0.011)):
        lines = [f"{time_of(row[0]) + late:.6f} {part}/{time_of(row[0]):.6f}.png\n" for row in rows]
        (folder / f"{part}.txt").write_text("# timestamp filename\n" + "".join(lines))
    turns = [Rotation.from_matrix(pose[:3, :3]).as_quat() for *_, pose in rows]
    lines = [f"{time_of(row[0]) - 0.004:.4f} {words(row[3][:3, 3])} {words(q)}\n" for row, q in zip(rows, turns)]
    (folder / "groundtruth.txt").write_text("# timestamp tx ty tz qx qy qz qw\n" + "".join(lines))


def write_arkit(folder: Path, rows, K):
    write_images(folder, rows, "lowres_wide/42_{time:.3f}.png", "lowres_depth/42_{time:.3f}.png")
    (folder / "lowres_wide_intrinsics").mkdir()
    lines = []
    for name, *_, pose in rows:
        camera = f"{SIZE[0]} {SIZE[1]} {words(K[[0, 1, 0, 1], [0, 1, 2, 2]])}\n"
        (folder / f"lowres_wide_intrinsics/42_{time_of(name):.3f}.pincam").write_text(camera)
        there = invert_rigid(pose)
        turn = words(Rotation.from_matrix(there[:3, :3]).as_rotvec())
        lines.append(f"{time_of(name):.6f} {turn} {words(there[:3, 3])}\n")
    (folder / "lowres_wide.traj").write_text("".join(lines))


def colmap_model(rows, K) -> tuple[list[float], list[tuple], np.ndarray]:
    "Parameters of a PINHOLE, then number, numbers of the pose and file of each image, and points."
    images = []
    for number, (name, *_, pose) in enumerate(rows, 1):
        turn = Rotation.from_matrix(pose[:3, :3].T).as_quat(scalar_first=True)
        images.append((number, [*turn, *invert_rigid(pose)[:3, 3]], f"{name}.png"))
    points = np.random.default_rng(0).uniform(-1, 1, (12, 3))
    return [K[0, 0], K[1, 1], K[0, 2] + 0.5, K[1, 2] + 0.5], images, points


def write_colmap_text(folder: Path, rows, K):
    write_images(folder, rows, "images/{name}.png")
    (folder / "sparse/0").mkdir(parents=True)
    parameters, images, points = colmap_model(rows, K)
    (folder / "sparse/0/cameras.txt").write_text(f"# Cameras\n1 PINHOLE {SIZE[0]} {SIZE[1]} {words(parameters)}\n")
    lines = [f"{number} {words(pose)} 1 {name}\n1.0 2.0 -1 3.5 2.5 4\n" for number, pose, name in images]
    (folder / "sparse/0/images.txt").write_text("# Images\n" + "".join(lines))
    lines = [f"{number} {words(point)} 90 120 160 0.5 1 0 2 0\n" for number, point in enumerate(points)]
    (folder / "sparse/0/points3D.txt").write_text("".join(lines))


def write_colmap_binary(folder: Path, rows, K):
    write_images(folder, rows, "images/{name}.png")
    (folder / "sparse/0").mkdir(parents=True)
    parameters, images, points = colmap_model(rows, K)
    (folder / "sparse/0/cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 1, 1, *SIZE, *parameters))
    parts = [
        struct.pack("<I7dI", number, *pose, 1) + name.encode() + b"\0" + struct.pack("<Qddq", 1, 1, 2, -1)
        for number, pose, name in images
    ]
    (folder / "sparse/0/images.bin").write_bytes(struct.pack("<Q", len(parts)) + b"".join(parts))
    parts = [struct.pack("<Q3d3BdQii", number, *p, 90, 120, 160, 0.5, 1, 1, 0) for number, p in enumerate(points)]
    (folder / "sparse/0/points3D.bin").write_bytes(struct.pack("<Q", len(parts)) + b"".join(parts))


# Independent readings: (kind, image) or a name -> what the files say of it; ValueError for what has no valid reading

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def plain(word: str) -> float:
    if not _NUMBER.fullmatch(word):
        raise ValueError(word)
    return float(word)


def once(pairs) -> dict:
    pairs = list(pairs)
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("twice")
    return dict(pairs)


def table(data: bytes, columns: int | None = None) -> list[list[str]]:
    "Words of the lines that are no comments."
    lines = data.decode().replace("\r\n", "\n").split("\n")
    rows = [line.replace(",", " ").split() for line in lines if line.strip() and not line.startswith("#")]
    if columns is not None and any(len(row) != columns for row in rows):
        raise ValueError("columns")
    return rows


def of_image(name: str, **parts) -> dict:
    return {(part, name): repr(parts.get(part, "")) for part in PARTS}


def posed_units(file: str, data: bytes) -> dict:
    part, stem = file.split("/")[0], Path(file).stem
    if part in ("images", "depth"):
        kinds = ("color", "camera") if part == "images" else ("depth",)
        return {(kind, stem): data for kind in kinds}
    numbers = [plain(word) for row in table(data) for word in row]
    if part == "poses":
        if len(numbers) != 16:
            raise ValueError("pose")
        return {("pose", stem): numbers}
    if len(numbers) not in (4, 9, 16):
        raise ValueError("camera")
    return {("camera", f"{number:03d}"): numbers for number in range(VIEWS)}


def nerfstudio_units(file: str, data: bytes) -> dict:
    if file != "transforms.json":
        part, stem = file.split("/")[0], Path(file).stem
        return {(kind, stem): data for kind in (("color", "camera") if part == "images" else ("depth",))}
    said = strict(data)
    found = {"unit": repr(said.get("depth_unit_scale_factor"))}
    cameras = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4", "p1", "p2", "w", "h", "camera_model")
    for name, frame in once((Path(frame["file_path"]).stem, frame) for frame in said["frames"]).items():
        known = said | frame
        pose, depth = known["transform_matrix"], known.get("depth_file_path")
        found |= of_image(name, pose=pose, depth=depth, camera=[known.get(key) for key in cameras])
    return found | {"order": repr([frame["file_path"] for frame in said["frames"]])}


def near(rows: list[list[str]], time: float, most: float) -> list[str] | None:
    found = min(rows, key=lambda row: abs(plain(row[0]) - time), default=None)
    return found if found and abs(plain(found[0]) - time) <= most else None


def tum_units(files: dict[str, bytes]) -> dict:
    listed = {part: table(files[f"{part}.txt"], 2) for part in ("rgb", "depth")}
    track, found = table(files["groundtruth.txt"], 8), {}
    for rows in (*listed.values(), track):
        once((plain(row[0]), row) for row in rows)
    [plain(word) for row in track for word in row]
    images = once((name, plain(time)) for time, name in listed["rgb"])
    for name, time in images.items():
        depth, place = near(listed["depth"], time, 0.02), near(track, time, 0.02)
        if depth and place:
            found |= of_image(Path(name).stem, pose=place[1:], depth=depth[1], color=name)
    there = [Path(name).stem for name in sorted(images, key=images.get) if ("pose", Path(name).stem) in found]
    return found | {"order": repr(there)}


def arkit_units(files: dict[str, bytes]) -> dict:
    track, found = table(files["lowres_wide.traj"], 7), {}
    once((plain(row[0]), row) for row in track)
    [plain(word) for row in track for word in row]
    for file, data in files.items():
        if file.endswith(".pincam"):
            ((width, height, *camera),) = table(data, 6)
            name, place = Path(file).stem, near(track, float(Path(file).stem.split("_")[1]), 0.005)
            if place:
                camera = [int(width), int(height), *map(plain, camera)]
                found |= of_image(name, pose=place[1:], camera=camera)
    return found | {"order": repr(sorted(name for part, name in found if part == "pose"))}


def colmap_text_units(files: dict[str, bytes]) -> dict:
    lines = {part: files[f"sparse/0/{part}.txt"].decode().replace("\r\n", "\n") for part in ("cameras", "images")}
    rows = {part: [line.split() for line in text.split("\n") if line[:1] != "#"] for part, text in lines.items()}
    cameras = once((int(row[0]), row[1:]) for row in rows["cameras"] if row)
    said, found = rows["images"], {}
    if said and not said[-1]:
        said.pop()
    if any(len(row) % 3 for row in said[1::2]):
        raise ValueError("keypoints")
    for name, row in once((row[9], row) for row in said[::2]).items():
        camera = cameras[int(row[8])]
        camera = [camera[0], *map(int, camera[1:3]), *map(plain, camera[3:])]
        found |= of_image(Path(name).stem, pose=[plain(word) for word in row[1:8]], camera=camera)
    points = table(files["sparse/0/points3D.txt"])
    for _, *row in points:
        if len(row) % 2 == 0 or not all(0 <= int(word) < 256 for word in row[3:6]):
            raise ValueError("point")
    return found | {"points": repr([[*map(plain, row[1:4]), *map(int, row[4:7])] for row in points])}


def colmap_binary_units(files: dict[str, bytes]) -> dict:
    at, data = 0, b""

    def take(kinds):
        nonlocal at
        found = struct.unpack_from("<" + kinds, data, at)
        at += struct.calcsize("<" + kinds)
        return found

    def records(part, one):
        nonlocal at, data
        at, data = 0, files[f"sparse/0/{part}.bin"]
        found = [one() for _ in range(min(*take("Q"), len(data) + 1))]
        if at != len(data):
            raise ValueError("length")
        return found

    def camera():
        number, model, *size = take("iiQQ")
        return number, [model, *size, *take(f"{[3, 4, 4, 5, 8][model]}d")]

    def image():
        nonlocal at
        number, *pose, which = take("I7dI")
        end = data.index(b"\0", at)
        name, at = data[at:end].decode(), end + 1
        (count,) = take("Q")
        at += 24 * count
        return name, (pose, which)

    def point():
        nonlocal at
        found = take("Q3d3B")[1:]
        _, count = take("dQ")
        at += 8 * count
        return found

    cameras, found = once(records("cameras", camera)), {}
    for name, (pose, which) in once(records("images", image)).items():
        found |= of_image(Path(name).stem, pose=pose, camera=cameras[which])
    return found | {"points": repr(records("points3D", point))}


def changed(before: dict, after: dict) -> set:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def by_file(units: Callable) -> Callable:
    "Of readings of one file."

    def touched(name, original, damaged):
        try:
            return changed(units(name, original), units(name, damaged))
        except Exception:  # whatever Python says to it
            return None

    return touched


def by_folder(units: Callable, folder: Path) -> Callable:
    "Of readings of all text files together; of an image its own pixels."
    texts = (".txt", ".bin", ".traj", ".pincam")
    whole = {name: (folder / name).read_bytes() for name in store_files(folder) if name.endswith(texts)}
    before = units(whole)

    def touched(name, original, damaged):
        if name not in whole:
            part, stem = name.split("/")[0], Path(name).stem
            return {("depth", stem)} if "depth" in part else {("color", stem), ("camera", stem)}
        try:
            return changed(before, units(whole | {name: damaged}))
        except Exception:  # whatever Python says to it
            return None

    return touched


def colmap_numbers(data: bytes, rng) -> bytes:
    "A count, a number or a coordinate."
    return on_numbers(
        data, rng, [(0, 8), (8, 4), (12, 4), (rng.randrange(len(data)), 8), (rng.randrange(len(data)), 4)]
    )


def by_kind(data: bytes, rng) -> bytes:
    "Lines of a text, bytes of anything else."
    try:
        data.decode()
    except UnicodeDecodeError:
        return on_bytes(data, rng)
    return (on_json if data[:1] == b"{" else on_lines)(data, rng)


def read_pixels(recording) -> dict:
    "All that a recording says of each image, and its pixels."
    found = {"unit": repr(recording.depth_unit), "scale": repr(recording.scale), "up": repr(recording.up)}
    for image in recording.images:
        name = image.image.stem
        if ("pose", name) in found:
            raise ValueError(f"{name} was read twice")
        found["pose", name] = told(image.pose)
        found["camera", name] = told(image.intrinsic) + repr((image.size, image.lens))
        found["color", name] = told(read_color(image))
        found["depth", name] = told(read_depth(image, recording.depth_unit)) if image.depth else ""
    points, colors = recording.points, recording.point_colors
    found["points"] = "" if points is None else repr([[*p, *c] for p, c in zip(points.tolist(), colors.tolist())])
    return found | {"order": repr([image.image.stem for image in recording.images])}


def make_sources(folder: Path) -> list[Target]:
    "A target for each format, with its original below the folder; and one that imports."
    rows, K = sample_views()
    camera = tuple(K[[0, 1, 0, 1], [0, 1, 2, 2]].tolist())
    formats = {
        "posed folder": (write_posed, read_posed_folder, lambda at: by_file(posed_units)),
        "nerfstudio": (write_nerfstudio, read_nerfstudio, lambda at: by_file(nerfstudio_units)),
        "TUM RGB-D": (write_tum, lambda at: read_tum(at, camera), lambda at: by_folder(tum_units, at)),
        "ARKitScenes": (write_arkit, read_arkit, lambda at: by_folder(arkit_units, at)),
        "COLMAP, text": (write_colmap_text, read_colmap, lambda at: by_folder(colmap_text_units, at)),
        "COLMAP, binary": (write_colmap_binary, read_colmap, lambda at: by_folder(colmap_binary_units, at)),
    }
    targets = []
    for name, (write, read, touched) in formats.items():
        place = folder / name
        place.mkdir()
        write(place, rows, K)
        files = store_files(place)
        told_by = [file for file in files if not file.endswith(".png")]
        files = told_by * max(1, 2 * (len(files) - len(told_by)) // len(told_by)) + files  # images: a third
        mutators = [by_kind, by_kind, on_bytes] + [colmap_numbers] * (name == "COLMAP, binary")
        reader = lambda at, read=read: read_pixels(in_metres(read(at), 1.0))  # noqa: E731
        targets.append(Target(name, place, files, reader, touched(place), mutators, 0.5))

    def imported(at):
        with TemporaryDirectory() as out:
            made = import_recording(in_metres(read_posed_folder(at), 1.0), Path(out))
            return {path.name: told(np.frombuffer(path.read_bytes(), np.uint8)) for path in sorted(made.iterdir())}

    place = folder / "import"
    place.mkdir()
    write_posed(place, rows, K)
    files = [file for file in store_files(place) if not file.endswith(".png")]
    return [
        *targets,
        Target("import", place, files, imported, lambda *_: ALL, [by_kind, by_kind, on_bytes], 0.1, False),
    ]
