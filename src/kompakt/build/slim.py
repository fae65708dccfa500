"""Attention modules whose inner width need not equal their outer width, with the same parameter names.

PyTorch's and torchvision's attention classes compute the inner width from the input's; once heads are
removed the two differ. ``slim`` gives such a module a class that reads the widths off its tensors.
The state dict stays the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

MAX_LOGIT_SCALE = 4.605170185988092  # ln 100: the bound of Swin V2's cosine attention


class SlimMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with heads removed: ``num_heads · head_dim`` need not be ``embed_dim``."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``nn.MultiheadAttention`` does; the arguments and results are the same."""
        swap = not self.batch_first and query.ndim == 3
        query, key, value = (item.transpose(0, 1) if swap else item for item in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None,) * 3
        q, k, v = (
            F.linear(item, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)
            for item, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = _mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            attention = F.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = F.dropout(attention, self.dropout, self.training) @ v
            shown = attention.mean(-3) if average_attn_weights else attention
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
            shown = None
        out = self.out_proj(mixed.transpose(-3, -2).flatten(-2))
        return (out.transpose(0, 1) if swap else out), shown


def _mask(attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Join the two masks of ``nn.MultiheadAttention`` into one that is added to the scores."""
    total: Tensor | None = None
    if attn_mask is not None:
        total = _additive(attn_mask, query)
        if total.ndim == 3 and query.ndim == 4:
            total = total.unflatten(0, (query.shape[0], -1))
    if padding is not None:
        added = _additive(padding, query)[..., None, None, :]
        total = added if total is None else total + added
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


class _SlimWindow(ShiftedWindowAttention):
    """Window attention of torchvision's Swin with heads removed."""

    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        tall, wide = x.shape[1:3]
        shift = (
            0 if rows >= tall else self.shift_size[0],
            0 if columns >= wide else self.shift_size[1],
        )
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        windows = _windows(x, rows, columns)
        mixed = self._attend(windows, _regions(x, shift, rows, columns) if any(shift) else None)
        mixed = F.dropout(self.proj(mixed), self.dropout, self.training)
        x = mixed.reshape(batch, tall // rows, wide // columns, rows, columns, channels).transpose(2, 3)
        x = x.reshape(batch, tall, wide, channels)
        x = torch.roll(x, shift, (1, 2)) if any(shift) else x
        return x[:, :height, :width, :].contiguous()

    def _attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        inner = (3, self.num_heads, self.head_dim)
        q, k, v = F.linear(windows, self.qkv.weight, self._bias()).unflatten(-1, inner).permute(2, 0, 3, 1, 4)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]).flatten(0, 1)
        attention = F.dropout(F.softmax(scores, dim=-1), self.attention_dropout, self.training)
        return (attention @ v).transpose(1, 2).flatten(2)

    def _bias(self) -> Tensor | None:
        return self.qkv.bias

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)


class SlimWindowAttention(_SlimWindow):
    """Swin's window attention with heads removed."""


class SlimWindowAttentionV2(_SlimWindow):
    """Swin V2's window attention (cosine scores, bias from a small network) with heads removed."""

    logit_scale: Tensor
    get_relative_position_bias = ShiftedWindowAttentionV2.get_relative_position_bias

    def _bias(self) -> Tensor | None:
        if self.qkv.bias is None:
            return None
        query, key, value = self.qkv.bias.chunk(3)
        return torch.cat([query, torch.zeros_like(key), value])

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosine * torch.clamp(self.logit_scale, max=MAX_LOGIT_SCALE).exp()


class SlimRelativeAttention(RelativePositionalMultiHeadAttention):
    """MaxViT's attention of torchvision with heads removed."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, G, P, D) to the same shape."""
        inner = (self.n_heads, self.head_dim)
        q, k, v = (part.unflatten(-1, inner).transpose(2, 3) for part in self.to_qkv(x).chunk(3, dim=-1))
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((F.softmax(scores, dim=-1) @ v).transpose(2, 3).flatten(3))


KINDS = frozenset(
    {
        nn.MultiheadAttention,
        ShiftedWindowAttention,
        ShiftedWindowAttentionV2,
        RelativePositionalMultiHeadAttention,
        SlimMultiheadAttention,
        SlimWindowAttention,
        SlimWindowAttentionV2,
        SlimRelativeAttention,
    }
)
"""The classes that ``slim`` changes or has changed; they read their numbers off their tensors."""


def slim(module: Any) -> None:
    """Change the class of an attention module whose tensors were cut; other modules are left alone."""
    kind = type(module)
    if kind in (nn.MultiheadAttention, SlimMultiheadAttention) and module.in_proj_weight is not None:
        module.num_heads = len(module.in_proj_weight) // 3 // module.head_dim
        module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]
        module._qkv_same_embed_dim = False  # or PyTorch's fused inference path would be taken, which ties the widths
        module.__class__ = SlimMultiheadAttention
    elif kind in (ShiftedWindowAttention, SlimWindowAttention):
        _slim_window(module, module.relative_position_bias_table.shape[1], SlimWindowAttention)
    elif kind in (ShiftedWindowAttentionV2, SlimWindowAttentionV2):
        _slim_window(module, len(module.logit_scale), SlimWindowAttentionV2)
    elif kind in (RelativePositionalMultiHeadAttention, SlimRelativeAttention):
        module.n_heads = module.relative_position_bias_table.shape[1]
        module.head_dim = len(module.to_qkv.weight) // 3 // module.n_heads
        module.__class__ = SlimRelativeAttention


def _slim_window(module: Any, heads: int, kind: type[nn.Module]) -> None:
    module.num_heads = heads
    module.head_dim = len(module.qkv.weight) // 3 // heads
    module.__class__ = kind


def _windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """Cut (N, H, W, C) into windows: (N·windows, rows·columns, C)."""
    batch, tall, wide, channels = x.shape
    x = x.reshape(batch, tall // rows, rows, wide // columns, columns, channels).transpose(2, 3)
    return x.reshape(-1, rows * columns, channels)


def _regions(x: Tensor, shift: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Return -100 between positions that the shift brought together from different regions, else 0."""
    tall, wide = x.shape[1:3]

    def band(size: int, window: int, by: int) -> Tensor:
        place = torch.arange(size, device=x.device)
        return (place >= size - window).to(x.dtype) + ((place >= size - by).to(x.dtype) if by else 0)

    region = 3 * band(tall, rows, shift[0])[:, None] + band(wide, columns, shift[1])[None, :]
    number = _windows(region[None, :, :, None], rows, columns).squeeze(-1)
    return torch.where(number[:, None, :] != number[:, :, None], -100.0, 0.0).to(x.dtype)
