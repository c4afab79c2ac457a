// What is known of a CUDA thread, its warp and the launch they belong to.
#pragma once

#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "types.h"

namespace emulate {

// Where in the source an operation stands.
struct Site {
    const char *file;
    int line;
    static Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
    bool operator==(const Site &other) const { return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0); }
    std::string text() const {
        const char *name = std::strrchr(file, '/');
        return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
    }
};

// In which order threads run that may run.
enum class Order : unsigned { forward, reverse, random };

// What a launch asks for; the caller (Rust) knows this layout.
struct Request {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    unsigned shared_limit;
    Order order;
    std::uint64_t seed;
    void **args;
};

// Lanes of a warp that meet in one operation.
struct Meeting {
    const char *what;
    Site site;
    unsigned mask;
    unsigned arrived = 0;
    bool complete = false;
    alignas(16) unsigned char posted[32][64];

    Meeting(const char *what, Site site, unsigned mask) : what(what), site(site), mask(mask) {}
};

// An asynchronous copy into shared memory that has not landed.
struct Copy {
    unsigned char *to;
    std::size_t bytes;
    unsigned group;
    unsigned char data[16];
};

struct Thread {
    uint3 index;
    unsigned linear;
    enum { ready, in_meeting, at_barrier, finished } state;
    Site site;
    const char *what;
    Context context;
    std::deque<Copy> copies;
    unsigned groups;  // committed so far
};

struct Warp {
    unsigned first, lanes;
    std::uint32_t epoch;
    unsigned finished;  // mask
    std::vector<std::shared_ptr<Meeting>> open;
};

}  // namespace emulate
