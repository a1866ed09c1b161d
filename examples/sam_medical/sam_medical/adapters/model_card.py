"""The model card of an adapter: what it segments, its requirements, and its usage."""

from __future__ import annotations

from sam_medical.adapters.task import TEXT_FILE, Task
from sam_medical.common.registry import is_place
from sam_medical.methods import METHODS
from sam_medical.methods.tuners import PeftTuner


def model_card(task: Task) -> str:
    """Returns the README of an adapter's folder, in Markdown."""
    method = METHODS[task.method]
    is_peft = isinstance(method.tuner, PeftTuner)
    labels = ", ".join(task.labels)
    by = ", by the names alone" if task.uses_text else ""
    facts = [f"- Method: {method.source}" + (f"; {method.departs}" if method.departs else "")]
    if method.is_sam:
        facts.append(
            f"- Base model: `{task.backbone}` at {task.image_size} pixels, weights with digest "
            f"`{task.backbone_digest}`"
        )
    if method.needs_text and not task.uses_text:
        facts.append("- Prompts: one learned token per label, and no text encoder")
    facts.append(
        f"- Images are read with intensity `{task.intensity}` and offset `{task.offset}`, volumes in the plane "
        f"`{task.plane}`"
    )
    if task.uses_text:
        facts.append(f"- Text encoder: `{task.text_encoder}`; its embeddings of the labels are in `{TEXT_FILE}`")
    lines = [
        "---",
        *(["library_name: peft"] if is_peft else []),
        "tags: [svdtune, segment-anything, medical-imaging]",
        "---",
        "",
        f"# {method.title}: {labels}",
        "",
        f"Segments {labels} in images like those of {task.dataset}{by}. For research only; not a medical device.",
        "",
        *facts,
        "",
    ]
    if extensions := sorted({name.partition(":")[0] for name in _names(task) if is_place(name)}):
        modules = " ".join(extensions)
        lines += [f"It needs code outside svdtune; if you trust it, give the commands `--extensions {modules}`.", ""]
    if is_peft:
        lines += ["PEFT reads this folder once its method is known: `import svdtune`.", ""]
    if not method.needs_expert:
        lines += [
            "In svdtune's repository:",
            "",
            "    python examples/sam_medical/predict.py --adapter FOLDER --images IMAGES --output MASKS",
            "",
        ]
    return "\n".join(lines)


def _names(task: Task) -> tuple[str, str, str]:
    return task.method, task.backbone, task.dataset
