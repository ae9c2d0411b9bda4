/* Work that threads share out among themselves: each takes the next task from a counter. Threads are
 * those of the OpenMP that the caller has loaded, which hands over GOMP_parallel, or null for none but
 * its own.
 */
#pragma once
#include <stdatomic.h>
#include <stdint.h>

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* `take` takes tasks of `work` until there are no more, on as many threads as there are tasks for. */
static inline void share_out(void (*take)(void *), void *work, int64_t num_tasks,
                             int64_t num_threads, Parallel *parallel) {
    int64_t threads = num_threads < num_tasks ? num_threads : num_tasks;
    if (parallel && threads > 1)
        parallel(take, work, (unsigned)threads, 0);
    else
        take(work);
}
