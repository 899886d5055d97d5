// A linear layer whose results need not become an array.
#pragma once

#include <cstdint>
#include <functional>

#include "context.h"
#include "layout.h"

namespace xds {

// Takes one panel product: `task` but for where its results go, of rows from first_row on. Called
// by several threads at once, each panel and row once.
using PanelSink =
    std::function<void(PanelTask& task, int64_t panel, int64_t first_row, int thread)>;

// Every panel product of x [rows, w.k] and w, handed to the sink instead of being computed.
void linear_panels(Context& ctx, const float* x, int64_t rows, const Weight& w,
                   const PanelSink& sink);

}  // namespace xds
