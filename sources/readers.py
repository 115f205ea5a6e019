"""Files of pictures and masks -> pixels. benchmarks.py knows what the values of a mask mean.

A broken file raises UserError. Readers of masks return the raw values [H,W], or whatever else the
file holds, which `Files.load` then refuses.
"""
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Transpose as Turn

from support.files import reading

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MASK_TYPES = (".png", ".tif", ".tiff", ".mat")
EXACT = ("PNG", "TIFF", "BMP", "GIF")  # lossless: formats accepted for masks, whatever their suffix
FORMATS = (*EXACT, "JPEG", "WEBP")  # formats accepted for pictures; PostScript would run code
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
         6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}  # of EXIF's orientations
GRAY_STEPS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies gray values of 2 and 4 bits
MAT_NAME = b"\1\0\0\0\x08\0\0\0LabelMap"  # type, size, text
MAT_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4"}


def upright(image, formats=EXACT):
    """A picture file or a PIL image -> PIL image, turned as its EXIF orientation says, and its raw
    mode: how the file stores values, in Pillow's words, such as "L;4" for gray of 4 bits."""
    if not isinstance(image, Image.Image):
        image = Image.open(image, formats=formats)
    raw_mode = image.tile[0][-1] if getattr(image, "tile", None) else ""
    raw_mode = raw_mode if isinstance(raw_mode, str) else str(raw_mode[0])  # of TIFF files
    image.load()
    turn = TURNS.get(image.getexif().get(0x0112))
    return image if turn is None else image.transpose(turn), raw_mode


def read_image(image):
    """A path, a PIL image, or a uint8 array [H,W,3] or [H,W] -> upright RGB PIL image. 16 bits are
    scaled to 8, and refused when the values do not fill them: the image would become black."""
    where = image if isinstance(image, (str, Path)) else f"the {type(image).__name__}"
    with reading(where, "an image"):
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image.astype(np.uint8, casting="no"))
        image, raw_mode = upright(image, FORMATS)
        if image.mode[0] in "IF":  # integers or floats, which Pillow would clip at 255
            values = np.asarray(image)
        elif ";16" in raw_mode:  # Pillow has kept the upper 8 bits
            values = 256 * np.asarray(image.convert("RGB"), int) + 255
        else:
            return image.convert("RGB")
        low, most, high = np.percentile(values, [0, 99, 100]).tolist()
        if not (0 <= low and 2 ** 12 <= most and 2 ** 14 <= high < 2 ** 16):
            raise ValueError("more than 8 bits should fill 0..65535, and lie in "
                             f"{low:g}..{high:g}, 99 % of them below {most:g}")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")


def read_mask(path):
    """A picture of one channel -> its values; of a palette the indices, never the colours."""
    with reading(path, f"a mask ({', '.join(EXACT)})"):
        image, raw_mode = upright(path)
        if raw_mode.startswith(("1;I", "L;I", "L;2I", "L;4I")):
            raise ValueError("its values are inverted: WhiteIsZero")
        return np.asarray(image) // GRAY_STEPS.get(raw_mode[:3], 1)


def read_palette(path):
    """A mask -> {index: (red, green, blue)} of the indices that it uses; {} without a palette."""
    image, _ = upright(path)
    colours = image.getpalette()
    used = image.getcolors() if image.mode == "P" else []
    return {i: tuple(colours[3 * i:3 * i + 3]) for _, i in used}


def read_ade_colours(path):
    """ADE20K's *_seg.png: red and green hold the id of the object's class."""
    with reading(path, "an ADE20K mask"):
        red, green, _ = np.moveaxis(np.asarray(upright(path)[0], np.uint16), -1, 0)
        return red // 10 * 256 + green


def read_label_map(path):
    """PASCAL-Context's .mat files: the array LabelMap, in at least 16 bits.

    MATLAB 5 writes a header of 128 bytes, then arrays: type and size in 32 bits each, content."""
    with reading(path, "a LabelMap"):
        content, at = memoryview(path.read_bytes()), 128
        while at < len(content):
            kind, size = struct.unpack_from("<II", content, at)
            array = content[at + 8:at + 8 + size]
            at += 8 + size
            if kind == 15:  # compressed, with its type and size
                array = memoryview(zlib.decompressobj().decompress(array))[8:]
            if array[32:48] == MAT_NAME:  # after 16 bytes of flags and 16 of sides; then values
                sides = np.frombuffer(array[24:32], "<i4")
                kind, small = struct.unpack_from("<HH", array, 48)
                begin = 52 if small else 56  # at most 4 bytes are where the size would be
                values = np.frombuffer(array, MAT_TYPES.get(kind, "<f8"), sides.prod(), begin)
                return values.reshape(sides, order="F") + np.uint16(0)
        raise KeyError("LabelMap")


class RunLengths(str):
    """One image's masks in the JSON of PASCAL in Detail. Its text, for messages, is file and
    image. phase: train or val; size: (height, width); masks: [(category id, run lengths)]."""


def read_painted(image):
    """RunLengths -> category ids [H,W], later masks over earlier ones, 0 where there is none."""
    with reading(image, "run-length masks"):
        from pycocotools.mask import decode, frPyObjects
        canvas = np.zeros(image.size, np.uint16)
        for category, runs in image.masks:
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
    """The image stems of a split: the words of a text file, or the JSON's images of that phase."""
    with reading(path, f"a list of {split} images"):
        if path.suffix == ".json":
            read = any(isinstance(mask, RunLengths) for mask in masks.values())
            details = masks if read else read_detail(path)
            stems = [stem for stem, image in details.items() if image.phase == split]
        else:
            stems = path.read_text(encoding="utf-8-sig").split()
        if path.parent.name == "Main":  # PASCAL-Context lacks a few of these
            stems = [stem for stem in stems if stem in masks]
        if not stems:
            raise ValueError("it names none")
        return stems
