"""Build the task that a checkpoint is of."""

from __future__ import annotations

from typing import Any

from seglab.task import SegmentationTask


def build_task(section: dict[str, Any], linked: dict[str, Any]) -> SegmentationTask:
    """Build a config's model without fetching the weights that its encoder began from.

    Args:
        section: `model` of the config.
        linked: What the data told the model: classes, names, colours.
    """
    import yaml
    from jsonargparse import ArgumentParser

    known = ("num_classes", "class_names", "palette", "ignore_index")
    section = {**section, "weights": None, **{key: linked[key] for key in known if key in linked}}
    section["network"]["init_args"]["num_classes"] = linked["num_classes"]
    encoder = section.get("network", {}).get("init_args", {}).get("encoder", {})
    for key, off in (("pretrained", False), ("checkpoint_path", None)):
        if key in encoder.get("init_args", {}):
            encoder["init_args"][key] = off
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SegmentationTask, "model")
    config = parser.parse_args([f"--model={yaml.safe_dump(section, default_flow_style=True)}"])
    task: SegmentationTask = parser.instantiate(config).model
    return task
