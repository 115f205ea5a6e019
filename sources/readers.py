"""Files of pictures and masks -> pixels. What the values of a mask mean, benchmarks.py knows.

Whatever is wrong with a file raises UserError, one sentence that names the path. Readers of masks
return raw values [H,W], or whatever else is in the file, for `Files.load` to refuse.
"""
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.errors import reading

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MASK_TYPES = (".png", ".tif", ".tiff", ".mat")
MOST = 200_000_000  # pixels, and bytes that a file may unpack to: broken ones claim any number
MAT_NAME = b"\1\0\0\0\x08\0\0\0LabelMap"  # type, size, text
MAT_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4"}


def read_image(path):
    """A picture file -> PIL image, as `upright_rgb` makes it."""
    with reading(path, "an image"):
        return upright_rgb(Image.open(path))


def as_image(image):
    """A path, a PIL image, or a uint8 array [H,W,3] or [H,W] -> what `upright_rgb` gives."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    with reading(f"the {type(image).__name__}", "an image: a path, a PIL image or a uint8 array"):
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image.astype(np.uint8, casting="no"))
        return upright_rgb(image)


def upright_rgb(image):
    """A PIL image of any mode -> RGB, turned upright as its EXIF data says, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # which PIL would clip
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def read_mask(path):
    """A picture of one channel; of a palette its indices, never its colours."""
    with reading(path, "a mask"):
        return np.asarray(Image.open(path))


def read_ade_colours(path):
    """ADE20K's *_seg.png: red and green hold the id of the object's class."""
    with reading(path, "an ADE20K mask"):
        picture = Image.open(path)
        if picture.mode != "RGB":
            raise ValueError(f"it should be RGB and is {picture.mode}")
        red, green, _ = np.moveaxis(np.asarray(picture, np.uint16), -1, 0)
        return red // 10 * 256 + green


def read_label_map(path):
    """PASCAL-Context's .mat files: the array LabelMap, in at least 16 bits.

    By hand, because scipy's loadmat believes what a broken file says, and crashes with it. MATLAB 5
    writes a header of 128 bytes, then arrays: type and size in 32 bits each, and their content.
    """
    with reading(path, "a LabelMap"):
        content, at = memoryview(path.read_bytes()), 128
        while at < len(content):
            kind, size = struct.unpack_from("<II", content, at)
            array = content[at + 8:at + 8 + size]
            at += 8 + size
            if kind == 15:  # compressed, with its type and size
                array = memoryview(zlib.decompressobj().decompress(array, MOST))[8:]
            if array[32:48] == MAT_NAME:  # after 16 bytes of flags and 16 of sides; then values
                sides = np.frombuffer(array[24:32], "<i4")
                kind, small = struct.unpack_from("<HH", array, 48)
                begin = 52 if small else 56  # at most 4 bytes are where the size would be
                values = np.frombuffer(array, MAT_TYPES.get(kind, "<f8"), sides.prod(), begin)
                return values.reshape(sides, order="F") + np.uint16(0)
        raise KeyError("LabelMap")


class RunLengths(str):
    """The masks of one image in the JSON of PASCAL in Detail; as text, where they are. phase: train
    or val; size: (height, width); masks: [(category id, run lengths)] in the file's order."""


def read_painted(image):
    """RunLengths -> category ids, later masks over earlier ones, 0 where there is none."""
    with reading(image, "run-length masks"):
        from pycocotools.mask import decode, frPyObjects
        if not 0 < image.size[0] * image.size[1] < MOST:  # the decoder does not ask
            raise ValueError(f"sides of {image.size}")
        canvas = np.zeros(image.size, np.uint16)
        for category, runs in image.masks:
            if tuple(runs["size"]) != image.size:
                raise ValueError(f"a mask of {runs['size']} in an image of {list(image.size)}")
            if isinstance(runs["counts"], list):
                runs = frPyObjects(runs, *image.size)
            canvas[decode(runs) > 0] = category
        return canvas


def read_detail(path):
    """The JSON of PASCAL in Detail -> {stem: RunLengths}."""
    with reading(path, "annotations of PASCAL in Detail"):
        content, by_id, by_stem = json.loads(path.read_text()), {}, {}
        for image in content["images"]:
            runs = RunLengths(f"{path}, {image['file_name']}")
            runs.phase, runs.masks = image["phase"], []
            runs.size = image["height"], image["width"]
            by_id[image["image_id"]] = by_stem[Path(image["file_name"]).stem] = runs
        for mask in content["annos_segmentation"]:
            by_id[mask["image_id"]].masks.append((mask["category_id"], mask["segmentation"]))
        return by_stem


def read_list(path, split, masks):
    """The stems of a split: the first word of each line, or of the JSON the images of that phase.
    PASCAL-Context lacks a few of those in ImageSets/Main."""
    if path.suffix == ".json":
        read = any(isinstance(mask, RunLengths) for mask in masks.values())
        details = masks if read else read_detail(path)
        return [stem for stem, image in details.items() if image.phase == split]
    with reading(path, "a list of images"):
        lines = path.read_text().splitlines()
        stems = [Path(line.split()[0]).stem for line in lines if line.strip()]
    return [stem for stem in stems if stem in masks or path.parent.name != "Main"]
