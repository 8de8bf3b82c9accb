"""What lmms-eval reads at every start: the model's name and where its class lies. No torch here."""

from lmms_eval.models.registry_v2 import ModelManifest

manifest = ModelManifest(
    "dynllava",
    simple_class_path="dynllava_plugin.evaluation.lmms_eval.model.DynamicLlava",
    aliases=("dynamic_llava",),
)
