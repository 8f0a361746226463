"""The exceptions that a launch in the simulator raises."""


class UnsupportedError(NotImplementedError):
    """The kernel uses an instruction or a feature that the simulator does not implement."""


class SimulationError(RuntimeError):
    """A kernel did something that is an error on a GPU, too."""


class OutOfBoundsError(SimulationError):
    """An access outside the tensors that the launch may touch, or outside the CTA's shared memory."""


class MisalignedError(SimulationError):
    """An access whose address is not a multiple of its size."""


class DataRaceError(SimulationError):
    """Two CTAs, or two warps with no barrier in between, touch a byte, unless both read it or both use atomics."""


class DeadlockError(SimulationError):
    """Threads wait for each other, or for another CTA, for ever."""


class DeviceAssertError(SimulationError):
    """`tl.device_assert` failed, or the kernel reached a trap."""
