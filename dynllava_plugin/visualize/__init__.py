"""What a policy keeps of an image and of an answer: as arrays (`explain`), as a picture, as a page."""

from dynllava_plugin.visualize.explain import Explanation, explain

__all__ = ["Explanation", "explain"]
