"""AdamW and its learning rate, a pure function of the tokens consumed."""

from torch import nn
from torch.optim import AdamW

from cascade_model.training_config import OptimizerConfig


def learning_rate(tokens: int, total_tokens: int, config: OptimizerConfig) -> float:
    """Warm-up, stable, decay (Hu et al., MiniCPM, arXiv 2404.06395, with a linear decay).

    `tokens` counts the step about to be taken as consumed, so the first step moves the weights and
    the last one runs at `final_lr_rate * peak_lr`. Being a function of tokens, the rate does not
    change with the number of ranks, nor by a restart.
    """
    warmup = config.warmup_rate * total_tokens
    decay = config.decay_rate * total_tokens
    if tokens < warmup:
        return config.peak_lr * tokens / warmup
    left = max(total_tokens - tokens, 0)
    if left >= decay:
        return config.peak_lr
    floor = config.final_lr_rate
    return config.peak_lr * (floor + (1 - floor) * left / decay)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW with weight decay on matrices only; norms and biases are left free."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.peak_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


def set_learning_rate(optimizer: AdamW, value: float) -> None:
    """Give every group of parameters the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
