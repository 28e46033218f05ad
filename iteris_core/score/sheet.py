"""A contact sheet: images in labelled rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image | None]],
    columns: Sequence[str],
    *,
    cell: int = 128,
    title: str = "",
) -> Image.Image:
    """One row per label of ``rows``, one column per label of ``columns``; None leaves a gap.

    Images are scaled to ``cell`` pixels; column labels wrap to the width of a cell.
    """
    small, large = ImageFont.load_default(12), ImageFont.load_default(16)
    gap, left = 4, 8 + max(int(large.getlength(label)) for label in rows)
    labels = [_wrap(label, small, cell) for label in columns]
    heading = 28 if title else 8
    top = heading + 15 * max(len(lines) for lines in labels) + 6
    width = left + len(columns) * (cell + gap) + 4
    sheet = Image.new("RGB", (width, top + len(rows) * (cell + gap) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((8, 5), title, fill="black", font=large)
    for index, lines in enumerate(labels):
        x = left + index * (cell + gap)
        for number, line in enumerate(lines):
            pen.text((x, heading + 15 * number), line, fill="#333", font=small)
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * (cell + gap)
        pen.text((4, y + cell // 2 - 10), label, fill="black", font=large)
        for index, picture in enumerate(pictures):
            if picture is not None:
                scaled = picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(scaled, (left + index * (cell + gap), y))
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
