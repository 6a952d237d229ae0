"""Best-fit packing: which pieces share a row, so that little of a row is padding and no piece is cut.

Only lengths go in and only indices come out; what a piece is, and how rows become batches, is the business of others.
"""

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int64], *, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's lengths summing to at most `capacity`.

    Best-fit decreasing: the longest piece first, each into the row that it fills best, a new row only where none has
    room. It needs at most 11/9 of the fewest rows possible (Johnson 1973), and on texts of mixed length hardly more than
    the sum of the lengths. Pieces of equal length are taken in the order given. Every length is in 1..capacity.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left: the rows that have exactly this much
    rooms = 0  # bit n is set where open_rows[n] holds a row: the next larger room is found by one shift
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit set
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows
