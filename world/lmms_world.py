"""The functions of lmms_world.yaml: the questions of a world as a task of lmms-eval, scored as eval.py scores them."""

from PIL import Image

from inputs.images import open_image, resolve_inside
from world.probes import METRICS


def doc_to_visual(doc: dict, options: dict) -> list[Image.Image]:
    """The image of a question. Args: options: its world's folder under "world"."""
    return [open_image(resolve_inside(options["world"], doc["image"]))]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The score of an answer, overall and of its category."""
    metric = doc.get("metric") or ("objects_f1" if doc["category"] == "description" else "exact")
    score = METRICS[metric](results[0], doc["answer"])
    return {"overall": score, doc["category"]: score}
