// The calls of llama.h that can throw: context, decode, tokens.
#include "cpu.h"
#include "guard.h"

#include "llama.h"
#include "src/llama-ext.h"

#include <cstdio>
#include <future>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// llama.cpp exports it for its own tests.
const std::vector<std::pair<std::string, ggml_tensor *>> & llama_internal_get_tensor_map(const llama_model * model);

void ta_thread_computes(bool does) noexcept {
#if defined(__linux__) && defined(SYS_sched_setattr)
    // The first version of the kernel's sched_attr; libc has no name for it.
    struct {
        uint32_t size;
        uint32_t policy;
        uint64_t flags;
        int32_t  nice;
        uint32_t priority;
        uint64_t runtime;  // of an ordinary thread: its slice in nanoseconds, 0 is the default
        uint64_t deadline;
        uint64_t period;
    } attributes = {};
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 || attributes.policy > 3) {
        return;  // somebody chose a real-time policy for this thread
    }
    attributes.runtime = does ? 20'000'000 : 0;
    (void) syscall(SYS_sched_setattr, 0, &attributes, 0);
#else
    (void) does;
#endif
}

namespace {

// The mappings of a model's files, and how many bytes of weights are used in them: a mapping reaches from
// the first tensor that is used where it lies to the last, with what was copied elsewhere in between.
std::map<ggml_backend_buffer_t, size_t> used_of_mappings(const llama_model * model) {
    std::map<ggml_backend_buffer_t, size_t> used;
    for (const auto & [name, tensor] : llama_internal_get_tensor_map(model)) {
        if (tensor->buffer && std::string_view(ggml_backend_buffer_name(tensor->buffer)) == "CPU_Mapped") {
            used[tensor->buffer] += ggml_nbytes(tensor);
        }
    }
    return used;
}

// Threads are called like the one that makes them. The names tell in `top`, and tell ours apart.
class Namesake {
public:
    explicit Namesake(const char * name) {
#ifdef __linux__
        prctl(PR_GET_NAME, before_);
        prctl(PR_SET_NAME, name);
#else
        (void) name;
#endif
    }
    ~Namesake() {
#ifdef __linux__
        prctl(PR_SET_NAME, before_);
#endif
    }

private:
    char before_[16] = {};
};

// ggml ends the process when it gets no thread, so as many are asked for beforehand, all at a time.
bool gives_threads(int32_t count) {
    std::promise<void>       all_asked;
    std::shared_future<void> wait = all_asked.get_future().share();
    std::vector<std::thread> given;
    given.reserve(count);
    try {
        while (int32_t(given.size()) < count) {
            given.emplace_back([wait] { wait.wait(); });
        }
    } catch (const std::system_error &) {
    }
    all_asked.set_value();
    for (auto & thread : given) {
        thread.join();
    }
    return int32_t(given.size()) == count;
}

}  // namespace

int ta_pool_new(int32_t n_threads, uint32_t poll, ta_pool ** out, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        auto make = cpu_function<ggml_threadpool_t (*)(ggml_threadpool_params *)>("ggml_threadpool_new");
        if (!make) {
            return ta_fail(error, TA_REFUSED, "the CPU backend offers no thread pool");
        }
        if (!gives_threads(n_threads - 1)) {
            return ta_fail(error, TA_EXHAUSTED, "threads to compute with");
        }
        ggml_threadpool_params params;
        ggml_threadpool_params_init(&params, n_threads);
        params.poll = poll;

        auto pool = std::make_unique<ta_pool>();
        {
            const Namesake inherits("tabagent-worker");
            ta_thread_computes(true);
            pool->threads = make(&params);
            ta_thread_computes(false);
        }
        if (!pool->threads) {
            return ta_fail(error, TA_REFUSED, "the thread pool could not be created");
        }
        *out = pool.release();
        return int(TA_OK);
    });
}

void ta_pool_free(ta_pool * pool) noexcept {
    ta_guard(nullptr, [&] {
        delete pool;
        return int(TA_OK);
    });
}

struct ta_context {
    llama_context * llama = nullptr;

    std::vector<llama_token>    tokens;
    std::vector<llama_pos>      positions;
    std::vector<llama_seq_id>   sequences;
    std::vector<llama_seq_id *> sequence_pointers;
    std::vector<int32_t>        sequence_counts;
    std::vector<int8_t>         wanted;

    ~ta_context() {
        if (llama) {
            llama_detach_threadpool(llama);
            llama_free(llama);
        }
    }
};

int ta_context_new(llama_model * model, const ta_context_params * params, ta_context ** out,
                   ta_error * error) noexcept {
    return ta_guard(error, [&] {
        llama_context_params with = llama_context_default_params();
        with.n_ctx                = params->n_ctx;
        with.n_batch              = params->n_batch;
        with.n_ubatch             = params->n_ubatch;
        with.n_seq_max            = params->n_seq_max;
        with.n_outputs_max        = params->n_outputs_max;
        with.n_threads            = params->n_threads;
        with.n_threads_batch      = params->n_threads;
        with.flash_attn_type      = static_cast<llama_flash_attn_type>(params->flash_attn);
        with.type_k               = static_cast<ggml_type>(params->kv_type);
        with.type_v               = static_cast<ggml_type>(params->kv_type);
        with.kv_unified           = params->kv_unified;
        with.offload_kqv          = params->offload_kqv;
        with.abort_callback       = params->abort;
        with.abort_callback_data  = params->abort_data;
        with.no_perf              = true;
        with.swa_full             = true;  // a window's cache that can be cut anywhere

        auto context   = std::make_unique<ta_context>();
        context->llama = llama_init_from_model(model, with);
        if (!context->llama) {
            return ta_fail(error, TA_REFUSED, "");
        }
        // Without OpenMP each graph would start and join threads of its own.
        if (params->pool) {
            llama_attach_threadpool(context->llama, params->pool->threads, nullptr);
        }
        const size_t rows = llama_n_batch(context->llama);
        context->tokens.reserve(rows);
        context->positions.reserve(rows);
        context->sequences.reserve(rows);
        context->wanted.reserve(rows);
        context->sequence_pointers.resize(rows);
        context->sequence_counts.assign(rows, 1);
        *out = context.release();
        return int(TA_OK);
    });
}

void ta_context_free(ta_context * context) noexcept {
    ta_guard(nullptr, [&] {
        delete context;
        return int(TA_OK);
    });
}

void ta_context_set_threads(ta_context * context, const ta_pool * pool, int32_t n_threads) noexcept {
    llama_attach_threadpool(context->llama, pool ? pool->threads : nullptr, nullptr);
    llama_set_n_threads(context->llama, n_threads, n_threads);
}

int ta_forget_mapped(const llama_model * model, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        for (const auto & [buffer, used] : used_of_mappings(model)) {
            const size_t size = ggml_backend_buffer_get_size(buffer);
            if (used >= size / 2) {
                continue;
            }
#ifdef __linux__
            const auto page  = uintptr_t(sysconf(_SC_PAGESIZE));
            const auto begin = (uintptr_t(ggml_backend_buffer_get_base(buffer)) + page - 1) / page * page;
            const auto end   = (uintptr_t(ggml_backend_buffer_get_base(buffer)) + size) / page * page;
            if (begin < end) {
                (void) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_DONTNEED);
            }
#endif
        }
        return int(TA_OK);
    });
}

int ta_context_memory(const ta_context * context, int32_t index, ta_memory * out, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        const llama_memory_breakdown all = llama_get_memory_breakdown(context->llama);
        if (index < 0 || size_t(index) >= all.size()) {
            return 1;
        }
        const auto & [type, bytes] = *std::next(all.begin(), index);
        ggml_backend_dev_t device  = ggml_backend_buft_get_device(type);
        // Memory in another layout for the CPU is not "host" memory, but it lies in RAM as well.
        const bool of_cpu = !device || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
        *out              = {};
        out->in_ram       = of_cpu || ggml_backend_buft_is_host(type);
        out->is_mapped    = std::string_view(ggml_backend_buft_name(type)) == "CPU_Mapped";
        out->weights      = bytes.model;
        if (out->is_mapped) {
            out->weights = 0;
            for (const auto & [buffer, used] : used_of_mappings(llama_get_model(context->llama))) {
                out->weights += used;
            }
        }
        out->context      = bytes.context;
        out->compute      = bytes.compute;
        std::snprintf(out->device, sizeof out->device, "%s", device ? ggml_backend_dev_name(device) : "CPU");
        return int(TA_OK);
    });
}

uint32_t ta_context_n_ctx_seq(const ta_context * context) noexcept { return llama_n_ctx_seq(context->llama); }
uint32_t ta_context_n_batch(const ta_context * context) noexcept { return llama_n_batch(context->llama); }
uint32_t ta_context_n_seq_max(const ta_context * context) noexcept { return llama_n_seq_max(context->llama); }

void ta_batch_clear(ta_context * context) noexcept {
    context->tokens.clear();
    context->positions.clear();
    context->sequences.clear();
    context->wanted.clear();
}

void ta_batch_add(ta_context * context, int32_t token, int32_t position, int32_t sequence,
                  bool want_logits) noexcept {
    if (context->tokens.size() >= context->sequence_pointers.size()) {
        return;  // the scheduler counts; growing could throw
    }
    context->tokens.push_back(token);
    context->positions.push_back(position);
    context->sequences.push_back(sequence);
    context->wanted.push_back(want_logits);
}

int ta_decode(ta_context * context, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        for (size_t row = 0; row < context->sequences.size(); ++row) {
            context->sequence_pointers[row] = &context->sequences[row];
        }
        llama_batch batch = {};
        batch.n_tokens    = static_cast<int32_t>(context->tokens.size());
        batch.token       = context->tokens.data();
        batch.pos         = context->positions.data();
        batch.n_seq_id    = context->sequence_counts.data();
        batch.seq_id      = context->sequence_pointers.data();
        batch.logits      = context->wanted.data();
        return llama_decode(context->llama, batch);
    });
}

int ta_logits(ta_context * context, int32_t row, const float ** out, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        *out = llama_get_logits_ith(context->llama, row);
        return int(TA_OK);
    });
}

bool ta_sequence_remove(ta_context * context, int32_t sequence, int32_t from, int32_t to) noexcept {
    return ta_guard(nullptr, [&] {
        return llama_memory_seq_rm(llama_get_memory(context->llama), sequence, from, to) ? 1 : 0;
    }) == 1;
}

bool ta_can_shift(const ta_context * context) noexcept {
    return ta_guard(nullptr, [&] {
        return llama_memory_can_shift(llama_get_memory(context->llama)) ? 1 : 0;
    }) == 1;
}

bool ta_sequence_shift(ta_context * context, int32_t sequence, int32_t keep, int32_t drop) noexcept {
    return ta_guard(nullptr, [&] {
        llama_memory_t memory = llama_get_memory(context->llama);
        if (!llama_memory_can_shift(memory) || !llama_memory_seq_rm(memory, sequence, keep, keep + drop)) {
            return 0;
        }
        llama_memory_seq_add(memory, sequence, keep + drop, -1, -drop);
        return 1;
    }) == 1;
}

int32_t ta_sequence_first(ta_context * context, int32_t sequence) noexcept {
    int32_t first = -1;
    ta_guard(nullptr, [&] {
        first = llama_memory_seq_pos_min(llama_get_memory(context->llama), sequence);
        return int(TA_OK);
    });
    return first;
}

int32_t ta_sequence_last(ta_context * context, int32_t sequence) noexcept {
    int32_t last = -1;
    ta_guard(nullptr, [&] {
        last = llama_memory_seq_pos_max(llama_get_memory(context->llama), sequence);
        return int(TA_OK);
    });
    return last;
}

bool ta_sequence_copy(ta_context * context, int32_t from, int32_t to) noexcept {
    return ta_guard(nullptr, [&] {
        llama_memory_t memory = llama_get_memory(context->llama);
        if (!llama_memory_seq_rm(memory, to, -1, -1)) {
            return 0;
        }
        // Sequences lie in streams of their own, between which only the whole can be copied.
        llama_memory_seq_cp(memory, from, to, -1, -1);
        return 1;
    }) == 1;
}

size_t ta_sequence_state_size(ta_context * context, int32_t sequence) noexcept {
    size_t size = 0;
    ta_guard(nullptr, [&] {
        size = llama_state_seq_get_size_ext(context->llama, sequence, 0);
        return int(TA_OK);
    });
    return size;
}

size_t ta_sequence_state_get(ta_context * context, int32_t sequence, uint8_t * out, size_t size) noexcept {
    size_t written = 0;
    ta_guard(nullptr, [&] {
        written = llama_state_seq_get_data_ext(context->llama, out, size, sequence, 0);
        return int(TA_OK);
    });
    return written;
}

size_t ta_sequence_state_set(ta_context * context, int32_t sequence, const uint8_t * state,
                             size_t size) noexcept {
    size_t read = 0;
    ta_guard(nullptr, [&] {
        read = llama_state_seq_set_data_ext(context->llama, state, size, sequence, 0);
        return int(TA_OK);
    });
    return read;
}

void ta_memory_clear(ta_context * context) noexcept {
    ta_guard(nullptr, [&] {
        llama_memory_clear(llama_get_memory(context->llama), true);
        return int(TA_OK);
    });
}

int ta_tokenize(const llama_vocab * vocab, const char * text, int32_t length, int32_t * out,
                int32_t capacity, bool add_special, bool parse_special, int32_t * count,
                ta_error * error) noexcept {
    return ta_guard(error, [&] {
        *count = llama_tokenize(vocab, text, length, out, capacity, add_special, parse_special);
        return int(TA_OK);
    });
}

int ta_piece(const llama_vocab * vocab, int32_t token, char * out, int32_t capacity, bool special,
             int32_t * length, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        *length = llama_token_to_piece(vocab, token, out, capacity, 0, special);
        return int(TA_OK);
    });
}

int ta_vocab_scan(const llama_vocab * vocab, uint8_t * ends_generation, int32_t n_tokens,
                  int32_t * longest_piece, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        *longest_piece = 1;
        for (llama_token token = 0; token < n_tokens; ++token) {
            ends_generation[token] = llama_vocab_is_eog(vocab, token);
            // With no room given, the needed length comes back as a negative number.
            const int32_t length = -llama_token_to_piece(vocab, token, nullptr, 0, 0, true);
            if (length > *longest_piece) {
                *longest_piece = length;
            }
        }
        return int(TA_OK);
    });
}

int ta_backend_load(const char * path, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        return ggml_backend_load(path) ? int(TA_OK) : ta_fail(error, TA_REFUSED, "");
    });
}

int ta_module_score(int (*ask)(void), int * score, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        *score = ask();
        return int(TA_OK);
    });
}

int ta_model_load(const char * path, const llama_model_params * params, llama_model ** out,
                  ta_error * error) noexcept {
    return ta_guard(error, [&] {
        *out = llama_model_load_from_file(path, *params);
        return int(TA_OK);
    });
}

int ta_throw(ta_error * error) noexcept {
    return ta_guard(error, []() -> int { throw std::runtime_error("thrown on purpose"); });
}
