// What every function of the shim does with an exception: nothing leaves as one.
#pragma once

#include "shim.h"

#include <cstdio>
#include <exception>
#include <new>

inline int ta_fail(ta_error * error, int status, const char * message) noexcept {
    if (error) {
        std::snprintf(error->message, sizeof(error->message), "%s", message);
    }
    return status;
}

template <class F>
int ta_guard(ta_error * error, F && body) noexcept {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return ta_fail(error, TA_NO_MEMORY, "out of memory");
    } catch (const std::exception & thrown) {
        return ta_fail(error, TA_THROWN, thrown.what());
    } catch (...) {
        return ta_fail(error, TA_THROWN, "an unknown exception");
    }
}
