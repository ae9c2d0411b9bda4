"""What goes wrong with machines, disks and processes, and what must come of it all the same.

`python -m tests.faults --minutes 5 --seed 90000`, on two cores (Intel Xeon, ext4) that had other
work beside it, printed no bad trial; summed over the nine scenes:

    fault       tried  recovered
    EIO            36         36
    ENOSPC         38         38
    damage         53         53
    kill           60         60
    power cut      49         49
    stall          53         53
    all           289        289
"""
