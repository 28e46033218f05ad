"""The node that shows images on a labelled sheet."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..iteris_core.concepts import lines_of
from ..iteris_core.errors import IterisError
from ..iteris_core.score.results import contact_sheet
from .pictures import to_image, to_pil
from .schema import schema


class ContactSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisScoreSheet",  # its name in saved graphs
            ["contact sheet", "image grid", "xy plot"],
            inputs=[
                io.Image.Input("images"),
                io.String.Input("labels", default="", multiline=True),
                io.String.Input("prompts", default="", multiline=True),
                io.Int.Input("cell", default=192, min=32, max=1024),
            ],
            group="compare",
            outputs=("sheet",),
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], labels: list[str], prompts: list[str], cell: list[int]
    ) -> io.NodeOutput:
        names = lines_of("\n".join(labels)) or [f"row {n + 1}" for n in range(len(images))]
        if len(names) < len(images):
            raise IterisError(f"Contact Sheet has {len(images)} rows but {len(names)} labels.")
        rows = {}
        for number, (name, batch) in enumerate(zip(names, images, strict=False), 1):
            rows[name if name not in rows else f"{name} ({number})"] = to_pil(batch)
        width = max(map(len, rows.values()))
        columns = lines_of("\n".join(prompts))
        title = columns.pop() if len(columns) == 1 and width > 1 else ""
        columns += [""] * (width - len(columns))
        sheet = contact_sheet(rows, columns[:width], cell=cell[0], title=title)
        return io.NodeOutput(to_image([sheet]))
