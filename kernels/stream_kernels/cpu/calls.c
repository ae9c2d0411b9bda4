/* Calls of the functions beside, made one after the other: what a layer does, without a return to
 * Python in between.
 */
#include "threads.h"

typedef struct {
    int64_t (*function)(const void *arguments, Parallel *); /* 0 where memory ran out */
    const void *arguments;
} Call;

typedef struct {
    const Call *calls;
    int64_t count;
} Calls;

/* 0 where memory ran out. */
int64_t make_calls(const Calls *all, Parallel *parallel) {
    for (int64_t i = 0; i < all->count; i++)
        if (!all->calls[i].function(all->calls[i].arguments, parallel)) return 0;
    return 1;
}
