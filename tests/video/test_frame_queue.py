import threading

from norton_deploy.video.frame_queue import FrameQueue


def test_queue_drops_the_oldest_or_waits():
    stop = threading.Event()
    live = FrameQueue[int](2, stop, drop_oldest=True)
    for item in range(5):
        live.put(item)
    live.close()
    assert [live.get(), live.get(), live.get()] == [3, 4, None] and live.dropped == 3
    patient = FrameQueue[int](1, stop, drop_oldest=False)
    taken: list[int | None] = []
    reader = threading.Thread(target=lambda: taken.extend(patient.get() for _ in range(4)))
    reader.start()
    for item in range(3):
        patient.put(item)
    patient.close()
    reader.join(10)
    assert taken == [0, 1, 2, None] and patient.dropped == 0
    stop.set()
    assert patient.get() is None
