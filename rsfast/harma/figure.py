"""One picture of what a model finds: right answers green, wrong ones red, the truth beside them."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from rsfast._files import replace
from rsfast.harma.data import CaptionedImages
from rsfast.harma.evaluation import Evaluation
from rsfast.harma.retrieval import scores

GREEN, RED, BLUE = (24, 140, 68), (200, 44, 44), (44, 92, 160)
TINT = {GREEN: (232, 246, 237), RED: (252, 235, 235), BLUE: (235, 241, 250)}
INK, FAINT, PAPER = (28, 30, 34), (112, 116, 124), (255, 255, 255)
WIDTH, MARGIN, GAP, THUMB, BORDER, TOP = 1400, 36, 16, 184, 6, 5
LINE = 24  # height of a line of text


def draw(path: str | Path, found: Evaluation, data: CaptionedImages, *, queries: int = 3) -> None:
    """Write a PNG: for ``queries`` images the five nearest captions, for ``queries`` captions the five nearest images.

    The queries are spread evenly over the data. A caption of another image is right too where it is word for word one
    of the image's own. Ties are ordered as :func:`retrieval_metrics` orders them.

    Args:
        path: Ends in ``.png``.
        found: What :func:`evaluate` returned for ``data``.
        data: For the images and captions.
        queries: Of each kind.
    """
    rows = [
        _Heading("Image to text", "an image, the five nearest captions, and its own captions"),
        *(_ImageQuery(found, data, i) for i in _spread(len(found.images), queries)),
        _Heading("Text to image", "a caption, the five nearest images, and its own image"),
        *(_TextQuery(found, data, t) for t in _spread(len(found.texts), queries, phase=0.2)),
    ]
    height = MARGIN * 2 + sum(row.height + GAP * 2 for row in rows)
    page = Image.new("RGB", (WIDTH, height), PAPER)
    pen, y = ImageDraw.Draw(page), MARGIN
    for row in rows:
        row.draw(page, pen, y)
        y += row.height + GAP * 2
    replace(Path(path), lambda temporary: page.save(temporary, "PNG"))


class _Heading:
    height = 44

    def __init__(self, title: str, explanation: str):
        self.title, self.explanation = title, explanation

    def draw(self, page, pen, y):
        pen.text((MARGIN, y), self.title, INK, _font(28))
        pen.text((MARGIN + _font(28).getlength(self.title) + GAP, y + 10), self.explanation, FAINT, _font(18))
        pen.line((MARGIN, y + 42, WIDTH - MARGIN, y + 42), (208, 210, 214), 2)


class _ImageQuery:
    ANSWERS = MARGIN + THUMB + GAP  # where the captions begin
    TRUTH = 980  # where the truth begins

    def __init__(self, found: Evaluation, data: CaptionedImages, row: int):
        self.image = data.load(found.images[row])
        own = [data.texts[found.texts[t]] for t in (found.text_to_image == row).nonzero()[:, 0].tolist()]
        self.answers = []
        for t, score in _best(found.image_features[row], found.text_features):
            text = data.texts[found.texts[t]]
            colour = GREEN if text in own else RED
            self.answers.append((_wrapped(text, _font(17), self.TRUTH - self.ANSWERS - 150), score, colour))
        self.truth = [_wrapped(text, _font(17), WIDTH - MARGIN - self.TRUTH - 32) for text in dict.fromkeys(own)]
        self.height = max(
            THUMB,
            sum(len(lines) * LINE + 14 for lines, *_ in self.answers),
            LINE + sum(len(lines) * LINE + 6 for lines in self.truth) + 14,
        )

    def draw(self, page, pen, y):
        _thumb(page, pen, self.image, MARGIN, y, INK)
        top = y
        for rank, (lines, score, colour) in enumerate(self.answers, 1):
            bottom = top + len(lines) * LINE + 8
            pen.rectangle((self.ANSWERS, top, self.TRUTH - GAP - 8, bottom), TINT[colour])
            pen.rectangle((self.ANSWERS, top, self.ANSWERS + BORDER, bottom), colour)
            pen.text((self.ANSWERS + 18, top + 5), str(rank), colour, _font(17))
            _lines(pen, self.ANSWERS + 44, top + 5, lines, INK)
            pen.text((self.TRUTH - GAP - 18, top + 5), f"{score:.2f}", FAINT, _font(17), anchor="ra")
            top = bottom + 6
        pen.rectangle((self.TRUTH, y, WIDTH - MARGIN, y + self.height), TINT[BLUE])
        pen.text((self.TRUTH + 14, y + 6), "truth", BLUE, _font(17))
        top = y + 6 + LINE
        for lines in self.truth:
            _lines(pen, self.TRUTH + 14, top, lines, INK)
            top += len(lines) * LINE + 6


class _TextQuery:
    TRUTH = WIDTH - MARGIN - THUMB

    def __init__(self, found: Evaluation, data: CaptionedImages, row: int):
        self.lines = _wrapped(f'"{data.texts[found.texts[row]]}"', _font(20), WIDTH - 2 * MARGIN)
        own, text = found.text_to_image[row].item(), data.texts[found.texts[row]]
        same = {i for i, t in zip(found.text_to_image.tolist(), found.texts, strict=True) if data.texts[t] == text}
        self.answers = [
            (data.load(found.images[i]), score, GREEN if i in same else RED)
            for i, score in _best(found.text_features[row], found.image_features)
        ]
        self.truth = data.load(found.images[own])
        self.height = len(self.lines) * (LINE + 4) + 8 + THUMB + LINE

    def draw(self, page, pen, y):
        _lines(pen, MARGIN, y, self.lines, INK, size=20)
        y += len(self.lines) * (LINE + 4) + 8
        for k, (image, score, colour) in enumerate(self.answers):
            x = MARGIN + k * (THUMB + GAP)
            _thumb(page, pen, image, x, y, colour)
            pen.text((x + 2, y + THUMB + 3), str(k + 1), colour, _font(17))
            pen.text((x + THUMB - 2, y + THUMB + 3), f"{score:.2f}", FAINT, _font(17), anchor="ra")
        middle = (MARGIN + TOP * (THUMB + GAP) - GAP + self.TRUTH) // 2
        pen.line((middle, y, middle, y + THUMB), (208, 210, 214), 2)
        _thumb(page, pen, self.truth, self.TRUTH, y, BLUE)
        pen.text((self.TRUTH + 2, y + THUMB + 3), "truth", BLUE, _font(17))


def _spread(count: int, queries: int, phase: float = 0.5) -> list[int]:
    """``queries`` indices, one from each equal share; ``phase`` says from where in it."""
    queries = min(queries, count)
    return [int((k + phase) * count / queries) for k in range(queries)]


def _best(query, candidates) -> list[tuple[int, float]]:
    row = scores(query[None], candidates)[0]
    order = torch.argsort(row, descending=True, stable=True)[:TOP]
    return [(i, row[i].item()) for i in order.tolist()]


def _font(size: int):
    return ImageFont.load_default(size)


def _wrapped(text: str, font, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _lines(pen, x, y, lines, colour, size=17):
    for k, line in enumerate(lines):
        pen.text((x, y + k * (LINE + (size > 17) * 4)), line, colour, _font(size))


def _thumb(page, pen, image, x, y, colour):
    inner = THUMB - 2 * BORDER
    pen.rectangle((x, y, x + THUMB - 1, y + THUMB - 1), colour)
    page.paste(image.resize((inner, inner), Image.Resampling.BICUBIC), (x + BORDER, y + BORDER))
