// The C side of the border: the calls of llama.cpp that can throw, each behind a function that
// cannot. What can abort instead is checked in Rust before it comes here.
//
// Every function that takes a `ta_error *` returns TA_OK, a status of llama.cpp's own where that
// is said, or TA_THROWN / TA_NO_MEMORY with the message of what was thrown. rust/src/ffi.rs
// declares the same functions; the two files change together.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define TA_NOEXCEPT noexcept
extern "C" {
#else
#define TA_NOEXCEPT
#endif

enum {
    TA_OK        = 0,
    TA_THROWN    = -100,
    TA_NO_MEMORY = -101,
    TA_REFUSED   = -102,  // a NULL or false where llama.cpp gives no reason
};

typedef struct ta_error {
    char message[512];
} ta_error;

struct llama_model;
struct llama_vocab;

// A llama_context, the batch that is being built for it, and the thread pool it computes on.
typedef struct ta_context ta_context;

typedef struct ta_context_params {
    uint32_t n_ctx;      // of all sequences together
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    uint32_t n_outputs_max;
    int32_t  n_threads;
    int32_t  flash_attn;  // -1 auto, 0 off, 1 on
    int32_t  kv_type;     // a ggml_type
    uint32_t poll;        // how long idle workers of the pool spin: 0 to 100
    bool     kv_unified;
    bool     offload_kqv;
    // Asked after each node of the graph on the CPU; true ends the decode with status 2.
    bool (*abort)(void * data);
    void * abort_data;
} ta_context_params;

int  ta_context_new(struct llama_model * model, const ta_context_params * params, ta_context ** out,
                    ta_error * error) TA_NOEXCEPT;
void ta_context_free(ta_context * context) TA_NOEXCEPT;

// At most as many as the context was made with.
void ta_context_set_threads(ta_context * context, int32_t n_threads) TA_NOEXCEPT;

// Sizes as llama.cpp rounded them.
uint32_t ta_context_n_ctx_seq(const ta_context * context) TA_NOEXCEPT;
uint32_t ta_context_n_batch(const ta_context * context) TA_NOEXCEPT;
uint32_t ta_context_n_seq_max(const ta_context * context) TA_NOEXCEPT;

// One row of a batch per call; the caller keeps to n_batch rows and valid ids.
void ta_batch_clear(ta_context * context) TA_NOEXCEPT;
void ta_batch_add(ta_context * context, int32_t token, int32_t position, int32_t sequence,
                  bool want_logits) TA_NOEXCEPT;

// 0 done, 1 no room, 2 aborted, -1 bad batch, -2 allocation failed, -3 compute failed.
int ta_decode(ta_context * context, ta_error * error) TA_NOEXCEPT;

// The logits of one row of the last batch; NULL for a row that did not want them.
int ta_logits(ta_context * context, int32_t row, const float ** out, ta_error * error) TA_NOEXCEPT;

// False: this kind of memory cannot forget a part of a sequence.
bool ta_sequence_remove(ta_context * context, int32_t sequence, int32_t from, int32_t to) TA_NOEXCEPT;
// Makes `to` hold what `from` holds, all of it; `to` loses what it held. Not for recurrent memory.
bool ta_sequence_copy(ta_context * context, int32_t from, int32_t to) TA_NOEXCEPT;
void ta_memory_clear(ta_context * context) TA_NOEXCEPT;

// The number of tokens written, or minus the number that there is no room for.
int ta_tokenize(const struct llama_vocab * vocab, const char * text, int32_t length, int32_t * out,
                int32_t capacity, bool add_special, bool parse_special, int32_t * count,
                ta_error * error) TA_NOEXCEPT;
int ta_piece(const struct llama_vocab * vocab, int32_t token, char * out, int32_t capacity,
             bool special, int32_t * length, ta_error * error) TA_NOEXCEPT;

// One pass over the vocabulary: which tokens end a generation, and the longest piece in bytes.
int ta_vocab_scan(const struct llama_vocab * vocab, uint8_t * ends_generation, int32_t n_tokens,
                  int32_t * longest_piece, ta_error * error) TA_NOEXCEPT;

int ta_backend_load(const char * path, ta_error * error) TA_NOEXCEPT;

// Multiplies a small matrix of each weight type on the CPU module that is loaded, in every kind of
// buffer that it offers. It dies where the module does: for a throw-away child process.
int ta_probe_cpu(ta_error * error) TA_NOEXCEPT;

// For tests of our sampler: a chain of llama.cpp's own, by name and in this order, hears the history
// and then gets one row of logits after the other. What it leaves of the last row comes back; there
// is room for `n_vocab` of them. rust/shim/samplers.cpp says which values belong to which name.
typedef struct ta_sampler {
    const char *         name;
    float                values[4];
    const char * const * strings;
    size_t               n_strings;
} ta_sampler;

int ta_samplers_apply(const struct llama_vocab * vocab, const ta_sampler * samplers, int32_t n_samplers,
                      const int32_t * history, int32_t n_history, const float * rows, int32_t n_rows,
                      int32_t n_vocab, int32_t * tokens, double * probabilities, int32_t * n_left,
                      ta_error * error) TA_NOEXCEPT;

// For tests of this border.
int ta_throw(ta_error * error) TA_NOEXCEPT;

#ifdef __cplusplus
}
#endif
