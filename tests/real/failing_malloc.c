// Preloaded before glibc: the n-th allocation of the engine fails, and as many after it as are asked for.
// The engine is whatever lies in this package's folder, and the C++ library that it allocates through;
// Python, and what the C library keeps for itself, always get what they ask for.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

void * __libc_malloc(size_t size);
void * __libc_calloc(size_t count, size_t size);
void * __libc_realloc(void * old, size_t size);
void * __libc_memalign(size_t alignment, size_t size);

static atomic_bool is_armed;
static atomic_long asked, first, last;

void arm(long nth, long count) {
    first    = nth;
    last     = nth + count - 1;
    asked    = 0;
    is_armed = true;
}

// How many were asked for since.
long disarm(void) {
    is_armed = false;
    return asked;
}

static bool fails(void * caller) {
    Dl_info found;
    if (!is_armed || !dladdr(caller, &found) || !found.dli_fname) {
        return false;
    }
    if (!strstr(found.dli_fname, "/tabagent_model/") && !strstr(found.dli_fname, "/libstdc++.so")) {
        return false;
    }
    const long number = ++asked;
    if (number < first || number > last) {
        return false;
    }
    errno = ENOMEM;
    return true;
}

#define FAILS fails(__builtin_return_address(0))

void * malloc(size_t size) { return FAILS ? NULL : __libc_malloc(size); }
void * calloc(size_t count, size_t size) { return FAILS ? NULL : __libc_calloc(count, size); }
void * realloc(void * old, size_t size) { return FAILS ? NULL : __libc_realloc(old, size); }
void * memalign(size_t alignment, size_t size) { return FAILS ? NULL : __libc_memalign(alignment, size); }
void * aligned_alloc(size_t alignment, size_t size) { return FAILS ? NULL : __libc_memalign(alignment, size); }

int posix_memalign(void ** out, size_t alignment, size_t size) {
    if (FAILS) {
        return ENOMEM;
    }
    void * given = __libc_memalign(alignment, size);
    if (!given) {
        return ENOMEM;
    }
    *out = given;
    return 0;
}
