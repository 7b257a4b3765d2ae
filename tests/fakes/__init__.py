"""A recording fake of CUDA and NCCL: the CUDA branches of the runtime run under it on a CPU, with real tensors.

:mod:`tests.fakes.cuda` has devices, streams, events and the allocator, :mod:`tests.fakes.nccl` the messages, and
:mod:`tests.fakes.hardware_queue` a device whose streams share hardware queues.
"""
