// What one run of a chat template may use, and the tree that keeps to it.
//
// A template comes with the model file, so from anybody, and llama.cpp's template engine has no
// limits: it would build `range(10**9)`, follow a macro that calls itself, and never end. So the
// parsed tree gets limits of ours, before llama.cpp runs it for the first time to find out what the
// template can do. They hold for each run: statements, processor time, stack and bytes.
//
//     {% for … %}body{% endfor %}   each statement of a body is counted before it runs, and the
//                                   text that it gave after it
//     range(…)  'x' * n             asked for their size first
//     a ~ b  x | filter  f(…)       measured when they have their result; `replace`, `join` and
//                                   `indent`, which can multiply, are also judged before
//
// What is left to a malicious template is to use what it may: a second, and some memory.
#include "template_limits.h"

#include "template_marks.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

using jinja::context;
using jinja::statement_ptr;
using jinja::value;

constexpr size_t MOST_TOKENS_OF_A_TAG = 4096;  // the parser and the engine recurse over them
constexpr int    DEEPEST_TREE         = 1000;
constexpr size_t DEEPEST_STACK        = size_t(4) << 20;  // of the 256 MiB that the caller gives

constexpr int64_t MOST_ITEMS    = 20'000;
constexpr int64_t WIDEST_INDENT = 1000;

using Clock = std::chrono::steady_clock;

double wall_seconds() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

// Unlike a wall clock it stands still while others have the processor, but it is slow to read.
double processor_seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
#else
    return wall_seconds();
#endif
}

double length_of(const value & v) {
    if (jinja::is_val<jinja::value_string>(v)) return double(v->val_str.length());
    if (jinja::is_val<jinja::value_array>(v)) return double(v->as_array().size() * sizeof(value));
    return 0;
}

const value & measured(const value & v) {
    Limits::current->make(length_of(v));
    return v;
}

// A value that has been computed already, in the place of the expression that it came from.
struct Known : jinja::expression {
    value known;
    explicit Known(value v) : known(std::move(v)) {}
    value execute_impl(context &) const override { return known; }
};

// A statement in the place of an expression.
struct Block : jinja::expression {
    statement_ptr inner;
    explicit Block(statement_ptr && statement) : inner(std::move(statement)) {}
    value execute_impl(context & ctx) const override { return inner->execute(ctx); }
};

statement_ptr known(value v) { return std::make_unique<Known>(std::move(v)); }

// What a builtin that multiplies is about to make.
void judge(const std::string & name, const value & input, std::vector<value> arguments) {
    for (value & argument : arguments) {
        if (auto * named = dynamic_cast<jinja::value_kwarg_t *>(argument.get())) argument = value(named->val);
    }
    double longest = 0;
    for (const value & argument : arguments) longest = std::max(longest, length_of(argument));
    if (name == "select" || name == "reject" || name == "selectattr" || name == "rejectattr") {
        for (const value & test : arguments) {
            if (is_text(test) && test->val_str.str() == "divisibleby") {
                throw std::runtime_error("`divisibleby` is no test for a list");  // see Divisor
            }
        }
    } else if (name == "append") {
        for (const value & item : arguments) Limits::current->keep(item, input);
    } else if (name == "replace" && arguments.size() >= 2) {
        const double places = length_of(input) / std::max(1.0, length_of(arguments[0])) + 1;
        Limits::current->size(places * length_of(arguments[1]));
    } else if (name == "join" && jinja::is_val<jinja::value_array>(input)) {
        Limits::current->size(double(input->as_array().size()) * longest);
    } else if (name == "indent" || name == "tojson") {
        for (const value & width : arguments) {
            const bool is_number = jinja::is_val<jinja::value_int>(width);
            if (is_number && width->as_int() > WIDEST_INDENT) Limits::current->size(INFINITY);
        }
        Limits::current->size(length_of(input) * longest);
    } else if (name == "map" && !arguments.empty() && jinja::is_val<jinja::value_string>(arguments[0]) &&
               jinja::is_val<jinja::value_array>(input)) {
        const std::vector<value> rest(arguments.begin() + 1, arguments.end());
        for (const value & item : input->as_array()) judge(arguments[0]->val_str.str(), item, rest);
    }
}

struct LimitedStatement : jinja::statement {
    statement_ptr inner;
    explicit LimitedStatement(statement_ptr && statement) : inner(std::move(statement)) { pos = inner->pos; }
    std::string type() const override { return inner->type(); }
    void visit(context & ctx) const override { inner->visit(ctx); }
    value execute_impl(context & ctx) const override {
        Limits::current->step();
        value result = inner->execute(ctx);
        Limits::current->output(size_t(length_of(result)));
        return result;
    }
};

// What is assigned, and the object that it is assigned to a member of, if it is.
struct LimitedAssignment : jinja::expression {
    statement_ptr             inner;
    const jinja::statement *  object;
    LimitedAssignment(statement_ptr && expression, const jinja::statement * place)
        : inner(std::move(expression)), object(place) {}
    value execute_impl(context & ctx) const override {
        value assigned = inner->execute(ctx);
        Limits::current->keep(assigned, object ? object->execute(ctx) : nullptr);
        return assigned;
    }
};

// The engine divides integers without a look at the divisor, and the processor ends the process.
struct Divisor : jinja::expression {
    statement_ptr inner;
    explicit Divisor(statement_ptr && expression) : inner(std::move(expression)) {}
    value execute_impl(context & ctx) const override {
        value divisor = inner->execute(ctx);
        if (divisor->val_int == 0 || divisor->val_int == -1) throw std::runtime_error("a division by 0 or -1");
        return divisor;
    }
};

struct LimitedRange : jinja::identifier {
    using identifier::identifier;
    value execute_impl(context & ctx) const override {
        value found = identifier::execute_impl(ctx);
        const auto * function = dynamic_cast<const jinja::value_func_t *>(found.get());
        if (!function) return found;
        return jinja::mk_val<jinja::value_func>(function->name, [found](const jinja::func_args & args) {
            double numbers[3] = {0, 0, 1};
            for (size_t i = 0; i < std::min<size_t>(args.count(), 3); ++i) {
                numbers[i] = args.get_pos(i)->as_float();
            }
            if (args.count() == 1) std::swap(numbers[0], numbers[1]);
            for (double number : numbers) Limits::current->items(std::fabs(number) / 1e9);  // no overflow
            if (numbers[2] != 0) Limits::current->items((numbers[1] - numbers[0]) / numbers[2]);
            return found->invoke(args);
        });
    }
};

struct LimitedBinary : jinja::binary_expression {
    using binary_expression::binary_expression;
    value execute_impl(context & ctx) const override {
        if (op.value != "*") return measured(binary_expression::execute_impl(ctx));
        value a = left->execute(ctx), b = right->execute(ctx);
        if (jinja::is_val<jinja::value_string>(b)) std::swap(a, b);
        if (jinja::is_val<jinja::value_string>(a) && jinja::is_val<jinja::value_int>(b)) {
            const double each = length_of(a) + sizeof(jinja::string_part);
            Limits::current->size(each * double(b->as_int()));
        }
        return binary_expression(op, known(a), known(b)).execute_impl(ctx);
    }
};

struct LimitedFilter : jinja::filter_expression {
    using filter_expression::filter_expression;
    value execute_impl(context & ctx) const override {
        const auto * call = dynamic_cast<const jinja::call_expression *>(filter.get());
        const auto * name = dynamic_cast<const jinja::identifier *>(call ? call->callee.get() : filter.get());
        if (!name) return measured(filter_expression::execute_impl(ctx));
        Limits::current->step();
        value input = operand->execute(ctx);
        std::vector<value> arguments;
        statement_ptr      again = std::make_unique<jinja::identifier>(name->val);
        if (call) {
            jinja::statements computed;
            for (const statement_ptr & argument : call->args) {
                arguments.push_back(argument->execute(ctx));
                computed.push_back(known(arguments.back()));
            }
            again = std::make_unique<jinja::call_expression>(std::move(again), std::move(computed));
        }
        judge(name->val, input, arguments);
        value result = filter_expression(known(input), std::move(again)).execute_impl(ctx);
        return measured(marked(name->val, input, arguments, result));
    }
};

struct LimitedCall : jinja::call_expression {
    using call_expression::call_expression;
    value execute_impl(context & ctx) const override {
        Limits::current->step();  // macros can call each other in their defaults alone
        std::vector<value> arguments;
        jinja::statements  again;
        for (const statement_ptr & argument : args) {
            arguments.push_back(argument->execute(ctx));
            again.push_back(known(arguments.back()));
        }
        value function = callee->execute(ctx);
        const auto * builtin = dynamic_cast<const jinja::value_func_t *>(function.get());
        if (builtin) judge(builtin->name, builtin->arg0, arguments);
        value result = call_expression(known(function), std::move(again)).execute_impl(ctx);
        const bool is_method = builtin && builtin->arg0;
        return measured(is_method ? marked(builtin->name, builtin->arg0, arguments, result) : result);
    }
};

// Walks a tree once and puts limits into it.
class Limiter {
public:
    void body(jinja::statements & statements) {
        for (statement_ptr & statement : statements) {
            node(statement);
            statement = std::make_unique<LimitedStatement>(std::move(statement));
        }
    }

private:
    int depth_ = 0;

    void nodes(jinja::statements & many) {
        for (statement_ptr & one : many) node(one);
    }

    template <class T>
    static T * as(statement_ptr & at) { return dynamic_cast<T *>(at.get()); }

    template <class Limited, class... Parts>
    static void replace(statement_ptr & at, Parts &&... parts) {
        const size_t pos = at->pos;
        auto limited = std::make_unique<Limited>(std::forward<Parts>(parts)...);
        limited->pos = pos;
        at = std::move(limited);
    }

    void node(statement_ptr & at) {
        if (!at) return;
        if (++depth_ > DEEPEST_TREE) throw std::runtime_error("it is nested too deeply");
        inside(at);
        --depth_;
    }

    void inside(statement_ptr & at) {
        if (auto * x = as<jinja::if_statement>(at)) {
            node(x->test), body(x->body), body(x->alternate);
        } else if (auto * x = as<jinja::for_statement>(at)) {
            if (x->body.empty()) x->body.push_back(std::make_unique<jinja::noop_statement>());
            node(x->iterable), body(x->body), body(x->default_block);
        } else if (auto * x = as<jinja::set_statement>(at)) {
            node(x->assignee), node(x->val), body(x->body);
            const auto * member = as<jinja::member_expression>(x->assignee);
            if (x->val) replace<LimitedAssignment>(x->val, std::move(x->val), member ? member->object.get() : nullptr);
        } else if (auto * x = as<jinja::macro_statement>(at)) {
            nodes(x->args), body(x->body);
        } else if (auto * x = as<jinja::call_statement>(at)) {
            node(x->call), nodes(x->caller_args), body(x->body);
        } else if (auto * x = as<jinja::filter_statement>(at)) {
            // The same as an expression: the block's text, filtered.
            auto always = known(jinja::mk_val<jinja::value_bool>(true));
            auto block  = std::make_unique<jinja::if_statement>(std::move(always), std::move(x->body),
                                                               jinja::statements());
            replace<jinja::filter_expression>(at, std::make_unique<Block>(std::move(block)),
                                              std::move(x->filter));
            inside(at);
        } else if (auto * x = as<Block>(at)) {
            node(x->inner);
        } else if (auto * x = as<jinja::member_expression>(at)) {
            const auto * name = as<jinja::identifier>(x->property);
            if (!x->computed && name && name->val.rfind("__", 0) == 0) {
                throw std::runtime_error("it asks for the attribute `" + name->val + "`");
            }
            node(x->object);
            if (x->computed) node(x->property);
        } else if (auto * x = as<jinja::slice_expression>(at)) {
            node(x->start_expr), node(x->stop_expr), node(x->step_expr);
        } else if (auto * x = as<jinja::array_literal>(at)) {
            nodes(x->val);
        } else if (auto * x = as<jinja::tuple_literal>(at)) {
            nodes(x->val);
        } else if (auto * x = as<jinja::object_literal>(at)) {
            for (auto & [key, val] : x->val) node(key), node(val);
        } else if (auto * x = as<jinja::select_expression>(at)) {
            node(x->lhs), node(x->test);
        } else if (auto * x = as<jinja::test_expression>(at)) {
            node(x->operand), node(x->test);
            auto * call = as<jinja::call_expression>(x->test);
            const auto * name = call ? as<jinja::identifier>(call->callee) : nullptr;
            if (name && name->val == "divisibleby") {
                for (statement_ptr & argument : call->args) {
                    replace<Divisor>(argument, std::move(argument));
                }
            }
        } else if (auto * x = as<jinja::unary_expression>(at)) {
            node(x->argument);
        } else if (auto * x = as<jinja::keyword_argument_expression>(at)) {
            node(x->val);
        } else if (auto * x = as<jinja::spread_expression>(at)) {
            node(x->argument);
        } else if (auto * x = as<jinja::ternary_expression>(at)) {
            node(x->condition), node(x->true_expr), node(x->false_expr);
        } else if (auto * x = as<jinja::binary_expression>(at)) {
            node(x->left), node(x->right);
            replace<LimitedBinary>(at, x->op, std::move(x->left), std::move(x->right));
        } else if (auto * x = as<jinja::filter_expression>(at)) {
            node(x->operand), node(x->filter);
            replace<LimitedFilter>(at, std::move(x->operand), std::move(x->filter));
        } else if (auto * x = as<jinja::call_expression>(at)) {
            node(x->callee), nodes(x->args);
            replace<LimitedCall>(at, std::move(x->callee), std::move(x->args));
        } else if (auto * x = as<jinja::identifier>(at)) {
            if (x->val.rfind("test_is_", 0) == 0) {
                throw std::runtime_error("it asks for the function `" + x->val + "`");
            }
            if (x->val == "range") replace<LimitedRange>(at, std::string(x->val));
        }
    }
};

}  // namespace

thread_local Limits * Limits::current = nullptr;

Limits::Limits(size_t num_messages, size_t bytes)
    : steps_(100'000 + 50 * num_messages),
      bytes_((size_t(2) << 20) + 4 * bytes),
      total_(16 * bytes_),
      made_(64 * double(bytes_)),
      nestings_(10'000 + 2 * num_messages),
      end_(processor_seconds() + 0.2 + 1e-4 * double(num_messages) + 2e-7 * double(bytes)),
      look_(wall_seconds()),
      stack_(reinterpret_cast<const char *>(this)),
      outer_(current) {
    current = this;
}

void Limits::check() const {
    if (exceeded_) throw std::runtime_error(exceeded_);
}

void Limits::step() {
    check();
    if (steps_-- == 0) stop("it runs too many statements");
    time();
    const char here = 0;
    const auto depth = stack_ - &here;
    if (size_t(depth < 0 ? -depth : depth) > DEEPEST_STACK) stop("it calls itself too deeply");
}

void Limits::time() {
    if (wall_seconds() >= look_) {
        const double left = end_ - processor_seconds();
        if (left < 0) stop("it takes too long");
        look_ = wall_seconds() + std::max(left, 0.001);
    }
}

void Limits::keep(const value & kept, const value & place) {
    if (!is_container(kept)) return;
    check();
    if (nestings_-- == 0) stop("it keeps too many lists and objects");
    if (place && reaches(kept, place)) stop("it puts something into itself");
}

void Limits::size(double bytes) {
    check();
    if (bytes > double(bytes_)) stop("it makes a text or a list that is too long");
}

void Limits::make(double bytes) {
    size(bytes);
    made_ -= bytes;
    if (made_ < 0) stop("it makes too many texts or lists");
}

void Limits::items(double count) {
    check();
    if (count > double(MOST_ITEMS)) stop("it makes a list that is too long");
}

void Limits::output(size_t bytes) {
    size(double(bytes));
    if (bytes > total_) stop("it gives too much text");
    total_ -= bytes;
}

bool Limits::reaches(const value & from, const value & to) {
    if (from == to) return true;
    if (!is_container(from)) return false;
    time();
    for (const value & item : from->val_arr) {
        if (reaches(item, to)) return true;
    }
    for (const auto & [key, item] : from->val_obj) {
        if (reaches(item, to)) return true;
    }
    return false;
}

void Limits::stop(const char * why) {
    exceeded_ = why;
    throw std::runtime_error(why);
}

jinja::program limited(const jinja::lexer_result & lexed) {
    size_t length = 0;
    for (const jinja::token & token : lexed.tokens) {
        const bool is_new = token.t == jinja::token::open_statement || token.t == jinja::token::open_expression;
        length = is_new ? 0 : length + 1;
        if (length > MOST_TOKENS_OF_A_TAG) {
            throw std::runtime_error("one of its tags is too long");
        }
    }
    jinja::program program = jinja::parse_from_tokens(lexed);
    Limiter().body(program.body);
    return program;
}
