"""The pictures and captions that the embedded `emoji` model learns: emoji glyphs over coloured backgrounds.

The glyphs are those of Noto Color Emoji (Debian's fonts-noto-color-emoji, needed for training and scoring only).
"""

import functools
import re
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size of the font's bitmaps

BACKGROUNDS = {
    "red": (205, 40, 45),
    "yellow": (250, 215, 60),
    "green": (50, 150, 70),
    "blue": (45, 95, 205),
    "purple": (125, 60, 165),
    "pink": (245, 160, 195),
    "brown": (120, 75, 45),
    "teal": (60, 190, 190),
    "white": (255, 255, 255),
    "black": (15, 15, 20),
}
SIZES = {"small": 0.42, "": 0.72, "large": 0.96}  # side of the glyph, as a part of the picture's
PLACES = {"": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


@functools.cache
def glyph(character):
    """The character's glyph as a square RGBA picture, cropped to its ink; None where the font has none.

    Raises:
        FileNotFoundError: the font is not installed.
    """
    try:
        font = ImageFont.truetype(FONT, FONT_SIZE)
    except OSError as error:
        raise FileNotFoundError(f"No font at {FONT}; Debian has it: apt-get install fonts-noto-color-emoji") from error
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    side = max(box[2] - box[0], box[3] - box[1])
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ink = canvas.crop(box)
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square


@functools.cache
def _scaled_glyph(character, side):
    # Premultiplied alpha keeps the glyph's edge free of the transparent black around it.
    return glyph(character).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")


def render(character, background, size="", place="", side=64):
    """Draws a character over a flat colour.

    Args:
        character: an emoji of the font.
        background: (red, green, blue), 0 … 255.
        size: "small", "" (standard) or "large".
        place: "left", "right", "top", "bottom", or "" for the middle.
        side: height and width of the picture in pixels.

    Returns:
        uint8 (side, side, 3).
    """
    ink = _scaled_glyph(character, round(SIZES[size] * side))
    room = (side - ink.width) / 2
    at = tuple(round(room + step * room * 0.9) for step in PLACES[place])
    picture = Image.new("RGBA", (side, side), (*background, 255))
    picture.alpha_composite(ink, at)
    return np.asarray(picture.convert("RGB"))


def caption(name, background, size="", place=""):
    """The caption of a picture, e.g. "small rocket on the left on a yellow background"."""
    where = f" on the {place}" if place else ""
    return f"{size} {name}{where} on a {background} background".strip()


def compositions():
    """All (size, place) of the grammar; a large glyph fills the picture and has no place."""
    return [(size, place) for size in SIZES for place in PLACES if not (size == "large" and place)]


def choose_emoji(count=300, keep=("red apple", "green apple", "rocket")):
    """Chooses emoji whose pictures differ: greedily, the one farthest from all chosen so far.

    Candidates are single characters with a glyph and a plain name of one to three words.

    Returns:
        {name: character}, sorted by code point.
    """
    names = {}
    for code in [*range(0x2600, 0x27C0), *range(0x2B00, 0x2C00), *range(0x1F300, 0x1FAFF)]:
        character = chr(code)
        name = unicodedata.name(character, "").lower()
        odd = re.search(
            r"fitzpatrick|symbol|sign|button|clock|japanese|ideograph|square|keycap|input|negative|suit", name
        )
        if re.fullmatch(r"[a-z]+( [a-z]+){0,2}", name) and not odd and glyph(character):
            names[name] = character
    vectors = {}
    for name, character in names.items():
        over = [render(character, rgb, side=32).astype("float32") for rgb in ((255, 255, 255), (0, 0, 0))]
        vectors[name] = np.concatenate(over).ravel() / 255
    table = np.stack(list(vectors.values()))
    order = list(vectors)
    chosen = [order.index(name) for name in keep]
    nearest = np.min([np.square(table - table[i]).sum(1) for i in chosen], axis=0)
    while len(chosen) < count:
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.square(table - table[chosen[-1]]).sum(1))
    picked = {order[i]: names[order[i]] for i in chosen}
    return dict(sorted(picked.items(), key=lambda item: item[1]))


def choose_held_out(names, backgrounds):
    """One background of each emoji is kept out of training, each background equally often: [[name, background], …]."""
    backgrounds = list(backgrounds)
    return [[name, backgrounds[(7 * i + 3) % len(backgrounds)]] for i, name in enumerate(names)]
