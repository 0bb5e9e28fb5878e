"""A stand-in for DUTS: cut-out photographs of objects on photographs, in DUTS's folders, from packages of Debian.

Scores on it are not scores on DUTS. The same pictures and seed give the same pairs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose
from tqdm import tqdm

from examples.data.files import ROOT, Unavailable, made, run, scratch
from examples.data.saliency import COMPOSITES, LAYOUTS

# Packages and where their pictures are.
OBJECTS = {"tuxpaint-stamps-default": "usr/share/tuxpaint/stamps"}
BACKGROUNDS = {
    "scratch": "usr/share/scratch/Media/Backgrounds",
    "lomiri-wallpapers-16.04": "usr/share/backgrounds",
    "mate-backgrounds": "usr/share/backgrounds/mate/nature",
}
SUFFIXES = (".png", ".jpg", ".jpeg")
COLOURS = 200  # in steps of 8; a drawing has fewer
SIZE = 128
COUNTS = {"DUTS-TR": 4000, "DUTS-TE": 800}
TEST_SHARE = 0.2  # of objects and of backgrounds


@dataclass(frozen=True)
class Material:
    """What pairs are composed of: objects with alpha (RGBA) and backgrounds (RGB)."""

    objects: Sequence[Image.Image]
    backgrounds: Sequence[Image.Image]


# ------------------------------------------------------------------------------------------------------- the pictures


def collect(root: Path) -> Path:
    """The folder with ``objects`` and ``backgrounds``, which is filled from the packages when it is not there."""
    pictures = root / "pictures"
    kinds = (("objects", OBJECTS, is_object), ("backgrounds", BACKGROUNDS, is_photograph))

    def fill(unfinished: Path) -> None:
        with scratch(root / "packages.unfinished") as packages:
            for kind, places, wanted in kinds:
                (unfinished / kind).mkdir(parents=True)
                for package, place in places.items():
                    print(f"Fetching {kind}: the package {package} of Debian ...", flush=True)
                    select(fetch(package, packages) / place, unfinished / kind, wanted)

    try:
        return made(pictures, fill)
    except Unavailable as reason:
        raise SystemExit(
            f"{pictures} is not there and cannot be made ({reason}): put cut-outs with transparent surroundings (PNG) "
            f"into {pictures / 'objects'} and photographs into {pictures / 'backgrounds'}"
        ) from None


def fetch(package: str, folder: Path) -> Path:
    """Where a package of Debian is unpacked; nothing of it is installed."""
    target = folder / package
    target.mkdir(parents=True)
    run("apt-get", "download", package, folder=target)
    (archive,) = target.glob("*.deb")
    run("dpkg-deb", "-x", archive.name, ".", folder=target)
    return target


def select(source: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    """Copy the pictures that are wanted, each once; a name tells the folders where it was."""
    seen = set()
    for path in tqdm([p for p in sorted(source.rglob("*")) if p.suffix.lower() in SUFFIXES], "choosing", unit="file"):
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest not in seen and wanted(path):
            seen.add(digest)
            (target / "-".join(path.relative_to(source).parts)).write_bytes(content)


def is_photograph(path: Path) -> bool:
    """Whether a picture has as many colours as a photograph."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((480, 480))
        return colours(np.asarray(small).reshape(-1, 3)) >= COLOURS


def is_object(path: Path) -> bool:
    """Whether a picture is the photograph of an object, cut out and not too small."""
    # The mirror image of another stamp could get into the other part.
    if "cartoon" in path.parts or "mirror" in path.stem:
        return False
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGBA"))
    opaque = pixels[..., 3] > 127
    if not (min(opaque.shape) >= 64 and max(opaque.shape) >= SIZE and 0.05 < opaque.mean() < 0.97):
        return False
    return colours(pixels[opaque][:, :3]) >= COLOURS


def colours(pixels: np.ndarray) -> int:
    """How many colours (n, 3) in uint8 has, in steps of 8."""
    return len(np.unique((pixels >> 3).astype(np.int32) @ (1024, 32, 1)))


# ---------------------------------------------------------------------------------------------------------- the pairs


def compose(root: Path | None = None, seed: int = 0, counts: dict[str, int] = COUNTS) -> Path:
    """Make the pairs, when they are not there, and return their folder, which has the layouts of DUTS-TR and DUTS-TE.

    Args:
        root: of the pictures and of the pairs; runs/data for None.
        seed: of the split and of the pairs.
        counts: of pairs, by the name of the layout.
    """
    root = Path(root or ROOT)
    target = root / "composites"
    if target.exists():
        if f"--seed {seed}\n" not in (target / "DUTS-TR" / COMPOSITES).read_text(encoding="utf-8"):
            raise SystemExit(f"{target} was made with another seed than {seed}: remove it, or choose another root")
        return target
    parts = split(collect(root), seed)

    def fill(unfinished: Path) -> None:
        for number, (name, material) in enumerate(parts.items()):
            write_part(unfinished / name, name, open_all(material), counts[name], (seed, number))
            text = note(name, material, counts[name], seed)
            (unfinished / name / COMPOSITES).write_text(text, encoding="utf-8")

    return made(target, fill)


def split(pictures: Path, seed: int) -> dict[str, dict[str, list[Path]]]:
    """The files of each part by their kind; no object and no background is in both parts."""
    parts: dict[str, dict[str, list[Path]]] = {name: {} for name in COUNTS}
    for number, kind in enumerate(("objects", "backgrounds")):
        files = sorted(path for path in (pictures / kind).glob("*") if path.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise SystemExit(
                f"{pictures / kind} has {len(files)} pictures: put two or more there, for training and test"
            )
        order = np.random.default_rng((seed, number)).permutation(len(files))
        test = set(order[: max(1, round(TEST_SHARE * len(files)))])
        parts["DUTS-TR"][kind] = [file for index, file in enumerate(files) if index not in test]
        parts["DUTS-TE"][kind] = [file for index, file in enumerate(files) if index in test]
    return parts


def open_all(files: dict[str, list[Path]]) -> Material:
    """The pictures of a part, not larger than is of use."""

    def read(path: Path, mode: str, size: int) -> Image.Image:
        with Image.open(path) as picture:
            converted = picture.convert(mode)
        if mode == "RGBA":
            converted = converted.crop(converted.getchannel("A").getbbox())
        converted.thumbnail((size, size), Resampling.LANCZOS)
        return converted

    return Material(
        [read(path, "RGBA", 2 * SIZE) for path in files["objects"]],
        [read(path, "RGB", 6 * SIZE) for path in files["backgrounds"]],
    )


def write_part(folder: Path, name: str, material: Material, count: int, seed: tuple[int, int]) -> None:
    """Write the pairs of a part on all cores; each has random numbers of its own."""
    pictures, masks = (folder / part for part in LAYOUTS[name])
    pictures.mkdir(parents=True)
    masks.mkdir()

    def make(index: int) -> None:
        jpeg, mask = pair(material, np.random.default_rng((*seed, index)))
        (pictures / f"{index:05}.jpg").write_bytes(jpeg)
        mask.save(masks / f"{index:05}.png")

    with ThreadPoolExecutor() as threads:
        list(tqdm(threads.map(make, range(count)), f"composing {name}", count, unit="pair"))


def note(name: str, material: dict[str, list[Path]], count: int, seed: int) -> str:
    """What tells everybody that these are composites."""
    digest = hashlib.sha256()
    for file in (*material["objects"], *material["backgrounds"]):
        digest.update(file.read_bytes())
    return (
        f"These {count} pairs are composites, not {name}: {len(material['objects'])} cut-out photographs of objects on "
        f"{len(material['backgrounds'])} photographs and a few drawings, none of which is in the other part.\n"
        f"Scores on them are not scores on {name}.\n"
        f"Made by python -m examples.data saliency --seed {seed}\n"
        f"sha256 of the pictures: {digest.hexdigest()}\n"
    )


def pair(material: Material, rng: np.random.Generator) -> tuple[bytes, Image.Image]:
    """A picture as JPEG, and its mask: one or two objects on a background."""
    background = material.backgrounds[rng.integers(len(material.backgrounds))]
    picture = shift_colours(crop(background, rng), rng).convert("RGBA")
    objects = Image.new("RGBA", picture.size)
    count = 1 + int(rng.random() < 1 / 3)
    for index in rng.choice(len(material.objects), min(count, len(material.objects)), replace=False):
        objects.alpha_composite(place(material.objects[index], SIZE * rng.uniform(0.4, 0.85) / count**0.5, rng))
    picture.alpha_composite(objects)
    noise = rng.normal(0, rng.uniform(0, 8), (SIZE, SIZE, 3))
    pixels = np.clip(np.asarray(picture.convert("RGB")) + noise, 0, 255).astype(np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=int(rng.integers(60, 96)))
    return jpeg.getvalue(), objects.getchannel("A").point(lambda alpha: 255 * (alpha > 127))


def crop(background: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random square of a background, at random mirrored."""
    side = int(min(background.size) * rng.uniform(0.4, 1))
    left, top = (int(rng.integers(length - side + 1)) for length in background.size)
    square = background.resize((SIZE, SIZE), Resampling.BICUBIC, (left, top, left + side, top + side))
    return square.transpose(Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else square


def place(cutout: Image.Image, length: float, rng: np.random.Generator) -> Image.Image:
    """An object of a given length, mirrored, turned and shifted at random, on a transparent picture."""
    scale = length / max(cutout.size)
    if rng.random() < 0.5:
        cutout = cutout.transpose(Transpose.FLIP_LEFT_RIGHT)
    cutout = cutout.resize([max(1, round(scale * side)) for side in cutout.size], Resampling.BICUBIC)
    cutout = cutout.rotate(rng.uniform(-30, 30), Resampling.BICUBIC, expand=True)
    colour = shift_colours(cutout.convert("RGB"), rng)
    centre = SIZE * rng.uniform(0.3, 0.7, 2)
    corner = [round(middle - side / 2) for middle, side in zip(centre, cutout.size, strict=True)]
    placed = Image.new("RGBA", (SIZE, SIZE))
    colour.putalpha(cutout.getchannel("A"))
    placed.paste(colour, corner)
    return placed


def shift_colours(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An RGB picture with each of its colours made stronger or weaker."""
    factors = rng.uniform(0.85, 1.15, 3) * rng.uniform(0.8, 1.2)
    return Image.fromarray(np.clip(np.asarray(picture) * factors, 0, 255).astype(np.uint8))
