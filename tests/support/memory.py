"""How much memory tensors take while something runs."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Sees what operations put out: the largest tensor, and the most bytes alive at a time.

    What was there before counts only if an operation returns it.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.most = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for one in tree_leaves(outputs):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {at: one for at, one in self._alive.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return outputs
