// ggml's CPU backend, which is a module chosen at run time: its functions are found by name.
#pragma once

#include "shim.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <memory>

template <class F>
F cpu_function(const char * name) {
    ggml_backend_reg_t registry = ggml_backend_reg_by_name("CPU");
    return registry ? reinterpret_cast<F>(ggml_backend_reg_get_proc_address(registry, name)) : nullptr;
}

struct ta_pool {
    ggml_threadpool_t threads = nullptr;

    ~ta_pool() {
        if (threads) {
            auto free_pool = cpu_function<void (*)(ggml_threadpool_t)>("ggml_threadpool_free");
            if (free_pool) {
                free_pool(threads);
            }
        }
    }
};

struct Free {
    void operator()(ggml_context * p) const { ggml_free(p); }
    void operator()(ggml_backend * p) const { ggml_backend_free(p); }
    void operator()(ggml_backend_buffer * p) const { ggml_backend_buffer_free(p); }
    void operator()(ggml_gallocr * p) const { ggml_gallocr_free(p); }
};
template <class T>
using Owned = std::unique_ptr<T, Free>;
