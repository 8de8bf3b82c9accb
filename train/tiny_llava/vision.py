"""Stage 1: a CLIP vision tower that says, patch by patch, what lies there.

A patch that an object overlaps learns that object's colour and shape, every other patch learns "background",
and all learn their row and column. So what a token knows is about its own place, as in a large CLIP, and a
language model can look objects up from the first step on.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES, Tile
from dynllava_plugin.images import open_image
from train.tiny_llava.optim import Optimizers

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
PATCHES = 8  # a side
SHOWN = 0.7
BACKGROUND_COLOR, BACKGROUND_SHAPE = len(COLORS), len(SHAPES)


class TileSet:
    """Tiles with known facts as tensors.

    Attributes
    ----------
    tiles : list of Tile
    pixels : uint8 [N, 64, 64, 3]
    masks : bool [N, 64, 64]
        Where the pixel differs from the background (the most frequent border colour).
    color, shape : int64 [N]
        Indices into COLORS and SHAPES.
    """

    def __init__(self, tiles: list[Tile]) -> None:
        self.tiles = known = [tile for tile in tiles if tile.known]
        self.pixels = torch.from_numpy(np.stack([np.array(open_image(t.path)) for t in known]))
        border = torch.cat(
            [self.pixels[:, 0], self.pixels[:, -1], self.pixels[:, :, 0], self.pixels[:, :, -1]], dim=1
        )
        code = (border.long() * torch.tensor([1 << 16, 1 << 8, 1])).sum(-1).mode(dim=1).values
        background = torch.stack([code >> 16, (code >> 8) & 255, code & 255], dim=-1)
        self.masks = (self.pixels.long() - background[:, None, None]).abs().sum(-1) > 60
        self.color = torch.tensor([COLORS.index(t.color) for t in known])
        self.shape = torch.tensor([SHAPES.index(t.shape) for t in known])
        rows, columns = self.masks.any(2).float(), self.masks.any(1).float()
        self.top, self.left = rows.argmax(1), columns.argmax(1)
        self.bottom, self.right = 63 - rows.flip(1).argmax(1), 63 - columns.flip(1).argmax(1)

    def __len__(self) -> int:
        return len(self.pixels)

    def shifted(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pixels [n, 64, 64, 3] and masks [n, 64, 64], each object moved within its tile, half mirrored."""

        def draw(low: Tensor, high: Tensor) -> Tensor:
            return low + (torch.rand(len(low), generator=generator) * (high - low + 1)).long()

        dy, dx = (
            draw(-self.top[index], 63 - self.bottom[index]),
            draw(-self.left[index], 63 - self.right[index]),
        )
        line = torch.arange(64)
        y, x = (line - dy[:, None]) % 64, (line - dx[:, None]) % 64
        mirrored = torch.rand(len(index), generator=generator) < 0.5
        x = torch.where(mirrored[:, None], x.flip(1), x)
        n, y, x = index[:, None, None], y[:, :, None], x[:, None, :]
        return self.pixels[n, y, x], self.masks[n, y, x]


def normalize(pixels: Tensor) -> Tensor:
    """uint8 or float 0..255 [n, H, W, 3] -> CLIP's pixel values [n, 3, H, W]."""
    return ((pixels.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def enlarge(pixels: Tensor) -> Tensor:
    """uint8 [n, 64, 64, 3] -> [n, 128, 128, 3] as the image processor resizes (bicubic, rounded)."""
    size = (128, 128)
    big = F.interpolate(pixels.permute(0, 3, 1, 2).float(), size=size, mode="bicubic", antialias=True)
    return big.round().clamp(0, 255).permute(0, 2, 3, 1)


def join_tiles(tiles: Tensor) -> Tensor:
    """[4n, 64, 64, ...] -> [n, 128, 128, ...]: top left, top right, bottom left, bottom right."""
    rest = tiles.shape[3:]
    grid = tiles.view(-1, 2, 2, 64, 64, *rest).transpose(2, 3)
    return grid.reshape(-1, 128, 128, *rest)


def patch_labels(owner: Tensor) -> Tensor:
    """Owner of each pixel: int64 [n, S, S] (0 background, k + 1 object k) -> [n, (S / 16)^2], each patch's object k or -1.

    A patch is an object's if it shows at least 70% as much of it as the patch that shows most. With every patch that an
    object touches a scene would have 17 object patches, more than the 12 that a keep rate of 20% leaves.
    """
    n, side = len(owner), owner.shape[1] // 16
    patches = owner.view(n, side, 16, side, 16).transpose(2, 3).reshape(n, side * side, 256)
    label = patches.amax(-1)  # where a patch of a hard scene straddles tiles, the last of its objects
    covered = ((patches > 0) & (patches == label[..., None])).sum(-1)
    most = covered.new_zeros(n, int(label.max()) + 1).scatter_reduce_(1, label, covered, "amax")
    return torch.where((label > 0) & (covered >= SHOWN * most.gather(1, label)), label - 1, -1)


def object_patches(masks: Tensor, scenes: int) -> Tensor:
    """Masks bool [4 * scenes + singles, 64, 64] -> int64 [images, 64]: each patch's object within its image, or negative."""
    tiles, alone = masks[: 4 * scenes].long(), masks[4 * scenes :].long()
    numbered = tiles * torch.arange(1, 5).repeat(scenes)[:, None, None]
    big = alone.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return patch_labels(torch.cat([join_tiles(numbered), big]))


VisionBatch = tuple[Tensor, Tensor, Tensor, Tensor]


def batches(
    tiles: TileSet, scenes: int, singles: int, generator: torch.Generator, augment: bool = True
) -> Iterator[VisionBatch]:
    """Endless (pixel values, object of each patch [n, 64], colours and shapes of the batch's objects)."""
    while True:
        index = torch.randint(len(tiles), (4 * scenes + singles,), generator=generator)
        pixels, masks = (
            tiles.shifted(index, generator) if augment else (tiles.pixels[index], tiles.masks[index])
        )
        owner = masks.long() * torch.arange(1, len(index) + 1)[:, None, None]
        split = 4 * scenes
        images = torch.cat([join_tiles(pixels[:split]).float(), enlarge(pixels[split:])])
        big = owner[split:].repeat_interleave(2, 1).repeat_interleave(2, 2)
        owners = torch.cat([join_tiles(owner[:split]), big])
        yield normalize(images), patch_labels(owners), tiles.color[index], tiles.shape[index]


class PatchHeads(nn.Module):
    """Linear read-outs of a patch's features; used in this stage only."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.sizes = [len(COLORS) + 1, len(SHAPES) + 1, side, side]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.linear(features).split(self.sizes, dim=-1)


def patch_features(tower: CLIPVisionModel, pixel_values: Tensor) -> Tensor:
    """[n, 64, width]: what LLaVA takes with `vision_feature_layer=-1`, "default" (no class token)."""
    return tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]


def vision_config(width: int = 128, layers: int = 4, image_size: int = 128) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
        image_size=image_size, patch_size=16, projection_dim=width, hidden_act="gelu", initializer_factor=1.0,
    )  # fmt: skip


def object_accuracy(
    tower: CLIPVisionModel, heads: PatchHeads, stream: Iterator[VisionBatch]
) -> tuple[float, float]:
    """Share of ten batches' objects whose colour / shape the sum over their patches gets right."""
    right, total = torch.zeros(2), 0
    with torch.no_grad():
        for _ in range(10):
            pixels, owner, color, shape = (part.to(tower.device) for part in next(stream))
            out = heads(patch_features(tower, pixels))
            flat, objects = owner.flatten(), len(color)
            on = flat >= 0
            for k, truth in enumerate((color, shape)):
                logits = out[k].flatten(0, 1)[on].log_softmax(-1)[:, :-1]
                votes = logits.new_zeros(objects, logits.shape[-1]).index_add_(0, flat[on], logits)
                right[k] += (votes.argmax(-1) == truth).sum().item()
            total += objects
    color_accuracy, shape_accuracy = (right / total).tolist()
    return color_accuracy, shape_accuracy


def train_vision(
    tower: CLIPVisionModel,
    stream: Iterator[VisionBatch],
    unseen: Callable[[], dict[str, Iterator[VisionBatch]]],
    steps: int,
    lr: float = 1e-3,
    place_weight: float = 0.1,
) -> CLIPVisionModel:
    """Train the tower on an endless stream; `unseen()` gives named streams to test on. Returns it in eval mode, frozen.

    `place_weight` is what a patch's row and column count for in the loss, beside its colour and shape.
    """
    side = tower.config.image_size // tower.config.patch_size
    device = tower.device
    heads = PatchHeads(tower.config.hidden_size, side).to(device)
    optimizers = Optimizers(nn.ModuleList([tower, heads]), steps, lr=lr, muon_lr=0.02)
    bar = tqdm(range(1, steps + 1), desc="vision tower", unit="step", mininterval=1)
    started = time.time()
    for step in bar:
        pixels, owner, color, shape = (part.to(device) for part in next(stream))
        out = heads(patch_features(tower, pixels))
        known = owner >= 0
        ignore = torch.full_like(owner, -100)
        loss = pixels.new_zeros(())
        for logits, truth, background in (
            (out[0], color, BACKGROUND_COLOR),
            (out[1], shape, BACKGROUND_SHAPE),
        ):
            label = torch.where(known, truth[owner.clamp(min=0)], background)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), label.flatten())
            # Most patches are background: objects alone once more, so that shapes aren't drowned.
            objects = torch.where(known, label, ignore).flatten()
            loss = loss + F.cross_entropy(logits.flatten(0, 1), objects, ignore_index=-100)
        place = torch.arange(side * side, device=device).repeat(len(owner))
        for logits, truth in ((out[2], place // side), (out[3], place % side)):
            loss = loss + place_weight * F.cross_entropy(logits.flatten(0, 1), truth)
        loss.backward()
        optimizers.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 500 == 0 or step == steps:
            found = [
                f"{name} {color:.1%} colour {shape:.1%} shape"
                for name, test in unseen().items()
                for color, shape in [object_accuracy(tower, heads, test)]
            ]
            seconds = time.time() - started
            bar.write(f"step {step}, {seconds:.0f} s, loss {loss.item():.3f}: unseen {'; '.join(found)}")
    return rescale(tower.eval().requires_grad_(False), next(stream)[0].to(device))


@torch.no_grad()
def rescale(tower: CLIPVisionModel, pixel_values: Tensor) -> CLIPVisionModel:
    """Give the features unit size without changing what the tower computes.

    Everything that writes to the residual stream is divided by the features' root mean square; the layer norms that
    read it don't notice. Features of size 10 and more make the projector's first thousand steps useless.
    """
    size = patch_features(tower, pixel_values).square().mean().sqrt().item()
    for name, module in tower.named_modules():
        if name.endswith(("pre_layrnorm", "self_attn.out_proj", "mlp.fc2")):
            module.weight.div_(size)
            module.bias.div_(size)
    return tower
