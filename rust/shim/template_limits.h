// What one run of a chat template may use, and the tree that keeps to it.
#pragma once

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"

#include <cstddef>
#include <cstdint>

// Once one of them is used up every further check fails as well, because the engine and the analysis
// swallow exceptions. The tree asks those that were made last in its thread.
class Limits {
public:
    // In proportion to what is rendered, so that ten thousand messages are fine.
    explicit Limits(size_t num_messages = 0, size_t bytes = 0);
    ~Limits() { current = outer_; }
    Limits(const Limits &) = delete;
    Limits & operator=(const Limits &) = delete;

    static thread_local Limits * current;

    const char * exceeded() const { return exceeded_; }
    void check() const;

    void step();
    void time();
    // A list or an object that is about to be kept, in `place` if that is one as well. Whatever walks
    // through it later does so by recursion.
    void keep(const jinja::value & kept, const jinja::value & place);
    // A text or a list that is about to be made.
    void size(double bytes);
    // A text or a list that was made, and may be kept.
    void make(double bytes);
    void items(double count);
    void output(size_t bytes);

private:
    bool reaches(const jinja::value & from, const jinja::value & to);
    [[noreturn]] void stop(const char * why);

    size_t       steps_, bytes_, total_;
    double       made_;
    size_t       nestings_;
    double       end_;   // on the processor's clock
    double       look_;  // on the wall clock: when to look at the other one
    const char * stack_;
    Limits *     outer_;
    const char * exceeded_ = nullptr;
};

// Parses a template; the tree asks `Limits::current` while it runs.
jinja::program limited(const jinja::lexer_result & lexed);
