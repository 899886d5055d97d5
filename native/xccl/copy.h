// Copying between segments and the caller's memory.
#pragma once

#include <cstdint>

namespace xds::xccl {

// As memcpy, for a piece of a transfer of `total` bytes. From a page on, the C library may choose the
// string instruction (rep movsb), a fifth faster while the bytes stay in the core's own cache. Two
// cases use plain vector loads and stores instead: large transfers, whose bytes come from another
// core, and a target that lies less than 64 bytes behind the source, whole pages aside, where that
// instruction takes 38 us for 64 KiB instead of 2 us (EPYC 7003). The slots lie on pages, and the C
// library puts large arrays 16 bytes behind one: a message received into one is that case.
void copy_bytes(uint8_t* to, const uint8_t* from, uint64_t bytes, uint64_t total);

}  // namespace xds::xccl
