"""MAM adapter: prefixes in the attention and parallel adapters beside the MLP."""

from .adapter import parallel_adapter
from .base import Method, chain
from .prefix import prefix


def mam(length: int = 30, size: int = 512, *, scale: float = 4.0, mlp: bool = False, hidden: int = 512) -> Method:
    """The mix-and-match adapter: He et al. 2022 (arXiv:2110.04366), section 4.7. It is a `chain` of two methods.

    Args:
      length: virtual tokens of the prefix (the paper's 30).
      size: of the adapters' bottleneck (the paper's 512); `scale`: s.
      mlp: train the prefix through an MLP of that `hidden` size, as the authors do.

    Raises:
      ValueError: as `prefix` and `parallel_adapter` do.

    The count is `2 n L k + (2 d m + d + m) L`.
    """
    arguments = {"length": length, "size": size, "scale": scale, "mlp": mlp, "hidden": hidden}
    parts = chain(prefix(length, mlp=mlp, hidden=hidden), parallel_adapter(size, scale=scale))
    return parts._replace(spec=(("mam", arguments),))
