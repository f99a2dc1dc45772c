// Whose text is whose, in a chat template's values: what came from messages is marked as input.
//
// llama.cpp's engine keeps the marks through most of what templates do with texts. Here is what it
// loses them in, so that control text in a tool's arguments does not become control text.
#pragma once

#include "jinja/runtime.h"

#include <string>
#include <vector>

bool is_text(const jinja::value & v);
bool is_container(const jinja::value & v);

// Marks every text in a value, the keys of objects as well.
void mark(const jinja::value & v, bool is_input);

// The result of a builtin, marked as what it was made of.
jinja::value marked(const std::string & builtin, const jinja::value & input,
                    const std::vector<jinja::value> & arguments, const jinja::value & result);
