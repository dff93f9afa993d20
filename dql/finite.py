"""NaN and infinity in states that are on a GPU: found by the kernels, told to the host without its waiting for them.

Each device has an alarm, one word of pinned host memory that its kernels can write to. The launch that reads the states
sets it if they hold NaN or infinity, and gives such states an all-NaN part of the first layer, so that their actions
are NaN and no others change. The host looks at the word when the next call comes. Where kernels are emulated or
interpreted on the CPU, the CPU has an alarm likewise.
"""

import ctypes
import threading

import torch

from dql.kernels.capture import refuse_while_capturing

_lock = threading.Lock()
_alarms: dict[torch.device, "Alarm"] = {}  # never emptied: CUDA graphs and kernels under way hold the addresses


class Alarm:
    """What a device's kernels set when states hold NaN or infinity.

    Attributes:
        word: int32 [1] in host memory, pinned for a GPU: the kernels write 1 to it, at the same address as the host's.
        cell: the same for the host: `cell.value` is a plain read, of some 50 ns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.word = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self.cell = ctypes.c_int32.from_address(self.word.data_ptr())

    def raise_if_set(self) -> None:
        """Reports once what was found since it last did.

        Raises:
            ValueError: an earlier call got states with NaN or infinity. Not while a CUDA graph is captured, which this
                would break: a later call does.
        """
        if not self.cell.value or capturing(self.device):
            return
        with _lock:
            was_set, self.cell.value = self.cell.value, 0
        if was_set:  # else another thread has told
            raise ValueError(
                f"the states of a call before this one, on {self.device}, held NaN or infinite values, and the actions "
                "of those rows are NaN; find the rows with ~states.isfinite().all(dim=1) and mend the source of the "
                "observations, or find the call with dql.check_states() after each, which waits for the device"
            )


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured from the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def alarm(device: torch.device) -> Alarm:
    """The device's, the same at every call.

    Raises:
        RuntimeError: it is not there yet and a CUDA graph is being captured.
    """
    found = _alarms.get(device)
    if found is None:
        refuse_while_capturing()
        with _lock:
            found = _alarms.get(device)
            if found is None:
                found = _alarms[device] = Alarm(device)
    return found


def raise_if_set(device: torch.device) -> None:
    """`Alarm.raise_if_set` where there is an alarm."""
    if (found := _alarms.get(device)) is not None:
        found.raise_if_set()


def check_states(device: torch.device | str | None = None) -> None:
    """Waits for the GPU, then raises if any call so far got states with NaN or infinity and it was not reported yet.

    The backends "cuda" and "triton" look at states on the device. Their repeated calls (`dql.sample` and `dql.select`
    from the second of a kind on, `GraphedSampler`, calls in your own CUDA graph) do not wait for it: actions of such
    states are NaN, those of others as ever, and a later call raises. This one asks at a point of your choosing:

        actions = dql.sample(states, policy, backend="cuda")
        dql.check_states()                                      # certain of all calls before it

    Args:
        device: a GPU; None: every one on which such calls were made.

    Raises:
        ValueError: states of an earlier call on the device held NaN or infinity; it is reported once, however many
            rows and calls it were.
        RuntimeError: a CUDA graph is being captured.
    """
    if device is None:
        asked = list(_alarms)
    else:
        one = torch.device(device)
        if one.type == "cuda" and one.index is None:
            one = torch.device("cuda", torch.cuda.current_device())
        asked = [one] if one in _alarms else []
    for each in asked:
        if each.type == "cuda":
            torch.cuda.synchronize(each)
    for each in asked:
        _alarms[each].raise_if_set()
