"""What the model does most, done fast: few-row products, dropout, attention, norms, the loss, and
the way from logits to a token. The tests compare each to the plain way of doing it."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Linear):
    """nn.Linear, faster where a CPU decodes: for a few rows, reading the weights is the work."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if (x.device.type != "cpu" or rows > 16 or torch.is_grad_enabled()
                or torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        if rows == 1:  # in bfloat16 at up to twice the speed of F.linear (Xeons with AMX)
            y = torch.mv(self.weight, x.flatten())
        elif rows > 2 and x.dtype == torch.float32 and self.weight.numel() >= 2**18:
            # MKL takes half the time this way round; less than a megabyte of weights gains nothing
            y = (self.weight @ x.reshape(rows, -1).t().contiguous()).t().contiguous()
        else:
            return super().forward(x)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element with probability p, and scale the others so that the mean stays.

    On a CPU, where random numbers are dear, 64 random bits serve eight elements: p is then the
    nearest of 1/256 to 255/256, and the scale is that of this p.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p)
    zeroed = min(max(round(256 * p), 1), 255)  # of the 256 values of a byte
    bits = torch.randint(-2**63, 2**63 - 1, (-(-x.numel() // 8),), device=x.device)  # int64
    kept = bits.view(torch.uint8)[:x.numel()].view(x.shape) >= zeroed
    return x * kept.to(x.dtype).mul_(256 / (256 - zeroed))


class Dropout(nn.Dropout):
    """`dropout`, in training only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p) if self.training and self.p else x


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0,
              seen: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention, by the fastest kernels there are for it.

    q: (B, H, T, D), the last T of the S positions of k and v: (B, H, S, D); T is S or 1.
    p: dropout of the attention weights.
    seen: (1, S) bool, the positions that a single q may read; None: all.
    Returns (B, H, T, D).
    """
    T = q.size(2)
    # A CPU's fused kernel knows no dropout, and in bfloat16 its backward is slow on short blocks.
    if q.device.type == "cpu" and (p or (q.dtype == torch.bfloat16 and 1 < T <= 128)):
        return attention_by_hand(q, k, v, p, seen)
    # A single new token may read all S; is_causal would leave it the first alone.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=p, is_causal=T > 1)


def attention_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0,
                      seen: torch.Tensor | None = None) -> torch.Tensor:
    """The same as `attention`, written out, for any T <= S."""
    (B, H, T, D), S = q.shape, k.size(2)
    if seen is None:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    mask = torch.zeros(T, S, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    scores = torch.baddbmm(mask, q.reshape(B * H, T, D), k.reshape(B * H, S, D).transpose(1, 2),
                           alpha=1 / math.sqrt(D))  # (B * H, T, S)
    weights = scores.softmax(dim=-1)
    weights = dropout(weights, p) if p else weights
    return (weights @ v.reshape(B * H, S, D)).view(B, H, T, D)


EPS = torch.finfo(torch.float32).eps  # of RMSNorm: what torch's own has for float32


class RMSNorm(nn.Module):
    """Divides vectors by their root mean square; no parameters (arXiv:1910.07467)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return _RMSNormOnCPU.apply(x)
        return F.rms_norm(x, (x.size(-1),), eps=EPS).type_as(x)  # a GPU's autocast makes it float32


class _RMSNormOnCPU(torch.autograd.Function):
    """The same; torch's own backward takes two to three times as long on a CPU."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.size(-1)).add_(EPS).rsqrt_()
        y = (x * scale).type_as(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, y_grad: torch.Tensor) -> torch.Tensor:
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(y_grad, y).unsqueeze(-1) / -y.size(-1)  # has no effect on y
        return torch.addcmul(y_grad, y, along).mul_(scale)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """The square of what is positive, 0 elsewhere."""
    return F.relu(x).square()


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of the logits x @ weight.T, of which a chunk of rows is held at a time.

    Each chunk's part of the gradients is computed beside its part of the loss, so that no logits
    are kept for the backward pass: over 50,304 columns they are a large part of all memory.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                dtype: torch.dtype) -> torch.Tensor:
        """x: (N, C); weight: (V, C); targets: (N,) int64, -1 where there is nothing to predict;
        dtype: of the matrix products, float32 or bfloat16: float16 would need a scaled loss.
        Returns the loss, a float32 scalar."""
        rows = max(len(x) // 8, 2**24 // len(weight))  # 64 MB of logits, or an eighth of them
        counted = targets >= 0
        loss = torch.zeros((), device=x.device)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        matrix = weight.to(dtype)
        for x_part, x_grad_part, target, counts in zip(
                x.split(rows), x_grad.split(rows), targets.split(rows), counted.split(rows),
                strict=True):
            x_part, target = x_part.to(dtype), target.clamp(min=0).unsqueeze(1)  # (n, C), (n, 1)
            log_probs = (x_part @ matrix.t()).float().log_softmax(dim=-1)  # (n, V)
            loss -= log_probs.gather(1, target).squeeze(1).masked_fill(~counts, 0.0).sum()
            grad = log_probs.exp_()  # of the logits: the probabilities, less 1 at the target
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.masked_fill_(~counts.unsqueeze(1), 0.0).to(dtype)
            x_grad_part.copy_(grad @ matrix)
            weight_grad += grad.t() @ x_part
        n = counted.sum()
        ctx.save_for_backward(x_grad, weight_grad, n)
        return loss / n

    @staticmethod
    def backward(ctx, loss_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_grad, weight_grad, n = ctx.saved_tensors
        scale = loss_grad / n
        return x_grad.mul_(scale), weight_grad.mul_(scale), None, None


def penalize_repeats(logits: torch.Tensor, tokens: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weaken the logits, (B, V), of the ids that occur in tokens, (B, T) (arXiv:1909.05858)."""
    seen = logits.gather(1, tokens)  # (B, T)
    return logits.scatter(1, tokens, torch.where(seen > 0, seen / penalty, seen * penalty))


def draw(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None,
         ) -> torch.Tensor:
    """Draw one id per row, (B,) int64, from logits (B, V); settings as in `GPT.stream`."""
    if temperature < 1e-6:  # 0, or so close to it that float32 would not hold the quotients
        return logits.argmax(dim=-1)
    ids = None
    if top_k is not None or top_p is not None:
        V = logits.size(1)
        logits, ids = logits.topk(min(top_k or V, V))  # (B, K), likeliest first
    # The largest becomes 0, so that no quotient overflows.
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_p is not None:
        likelier = probs.cumsum(dim=-1) - probs  # mass of the tokens before each
        probs = probs.masked_fill(likelier >= max(top_p, 1e-9), 0)  # float32 would make less 0
    drawn = torch.multinomial(probs, 1)  # (B, 1)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)
