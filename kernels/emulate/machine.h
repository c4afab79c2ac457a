// Runs a grid of CUDA threads as fibers, one block after another. Between barriers the threads run one at a time in an order that the
// launch chooses; a program that is right under any order computes the same under all.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "shadow.h"
#include "thread.h"

namespace emulate {

class Machine {
public:
    using Body = void (*)(void **args);

    // The machine of the running kernel.
    static Machine &current() { return *instance(); }

    // Runs `body` over the grid; returns an empty string or what went wrong.
    std::string run(const Request &request, Body body);

    // --- What a thread asks for ---
    Thread &thread() { return *thread_; }
    Warp &warp() { return warps_[thread_->linear / 32]; }
    unsigned lane() const { return thread_->linear % 32; }
    dim3 grid_size() const { return grid_; }
    dim3 block_size() const { return block_; }
    uint3 block_index() const { return block_index_; }

    // Waits for every thread of the block; how many of them voted.
    unsigned barrier(bool vote, Site site);
    // Posts `bytes` and waits for the lanes of `mask`.
    std::shared_ptr<Meeting> meet(const char *what, unsigned mask, const void *posted, std::size_t bytes, Site site);
    // Reports a defect of the kernel and ends the launch.
    [[noreturn, gnu::format(printf, 2, 3)]] void fail(const char *format, ...);

    // Shared memory: `bytes` for the declaration named by `key`, the same for every thread of the block.
    unsigned char *static_shared(const void *key, std::size_t bytes);
    unsigned char *dynamic_shared() { return shared_.get() + dynamic_at; }
    std::size_t dynamic_bytes() const { return request_->shared_bytes; }
    void touch(const void *at, std::size_t bytes, Access access);
    void copy_later(void *to, const void *from, std::size_t bytes, std::size_t valid);
    void commit_copies() { ++thread_->groups; }
    void wait_copies(unsigned under_way);

private:
    static constexpr std::size_t limit = 256 * 1024;
    static constexpr std::size_t dynamic_at = 64 * 1024;

    static Machine *&instance() {
        static thread_local Machine *machine = nullptr;
        return machine;
    }
    static void enter();
    void run_block();
    void prepare_block();
    bool run_warps();
    bool run_warp(Warp &warp);
    void run_random_warps();
    bool open_barrier();
    void leave();
    void settle(Warp &warp, Meeting &meeting);
    std::string name(unsigned linear) const;
    std::string stuck() const;
    Moment now() const { return {epoch_, warps_[thread_->linear / 32].epoch, static_cast<std::uint16_t>(thread_->linear)}; }
    std::uint64_t random();
    template <class T> void arrange(std::vector<T> &items);

    const Request *request_ = nullptr;
    Body body_ = nullptr;
    dim3 grid_, block_;
    uint3 block_index_{};
    unsigned count_ = 0;
    std::vector<Stack> stacks_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<unsigned> warp_order_, lane_order_;
    Thread *thread_ = nullptr;
    Context scheduler_;
    std::unique_ptr<unsigned char[]> memory_;
    struct Aligned {
        unsigned char *at = nullptr;
        unsigned char *get() const { return at; }
    } shared_;
    struct Declared {
        const void *key;
        std::size_t at, bytes;
    };
    std::vector<Declared> declared_;
    std::size_t static_bytes_ = 0;
    Shadow shadow_;
    std::uint32_t epoch_ = 0;
    unsigned votes_[2] = {0, 0};  // of this barrier and the one before
    std::uint64_t state_ = 0;
    std::string error_;
};

inline std::uint64_t Machine::random() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

template <class T> inline void Machine::arrange(std::vector<T> &items) {
    if (request_->order == Order::reverse) std::reverse(items.begin(), items.end());
    if (request_->order != Order::random) return;
    for (std::size_t left = items.size(); left > 1; --left) std::swap(items[left - 1], items[random() % left]);
}

inline std::string Machine::run(const Request &request, Body body) {
    request_ = &request;
    body_ = body;
    grid_ = dim3(request.grid[0], request.grid[1], request.grid[2]);
    block_ = dim3(request.block[0], request.block[1], request.block[2]);
    count_ = block_.x * block_.y * block_.z;
    state_ = request.seed;
    error_.clear();
    if (!memory_) {
        memory_.reset(new unsigned char[dynamic_at + limit + 128]);
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
        shared_.at = memory_.get() + (128 - address % 128) % 128;
    }
    shadow_.resize(dynamic_at + request.shared_bytes);
    while (stacks_.size() < count_) stacks_.emplace_back();
    threads_.resize(count_);
    lane_order_.resize(32);
    Machine *const outer = std::exchange(instance(), this);
    std::vector<std::uint64_t> blocks(static_cast<std::uint64_t>(grid_.x) * grid_.y * grid_.z);
    for (std::size_t block = 0; block < blocks.size(); ++block) blocks[block] = block;
    arrange(blocks);
    for (std::uint64_t block : blocks) {
        block_index_ = {static_cast<unsigned>(block % grid_.x), static_cast<unsigned>(block / grid_.x % grid_.y),
                        static_cast<unsigned>(block / grid_.x / grid_.y)};
        run_block();
        if (!error_.empty()) break;
    }
    instance() = outer;
    return error_;
}

inline void Machine::prepare_block() {
    std::memset(dynamic_shared(), 0xff, request_->shared_bytes);
    shadow_.begin(++epoch_);
    declared_.clear();
    static_bytes_ = 0;
    votes_[epoch_ % 2] = 0;
    warps_.clear();
    for (unsigned first = 0; first < count_; first += 32) warps_.push_back({first, std::min(32u, count_ - first), 1, 0, {}});
    for (unsigned linear = 0; linear < count_; ++linear) {
        Thread &thread = threads_[linear];
        thread.index = {linear % block_.x, linear / block_.x % block_.y, linear / block_.x / block_.y};
        thread.linear = linear;
        thread.state = Thread::ready;
        thread.copies.clear();
        thread.groups = 0;
        thread.context.start(stacks_[linear], enter);
    }
    warp_order_.resize(warps_.size());
    for (unsigned warp = 0; warp < warps_.size(); ++warp) warp_order_[warp] = warp;
    arrange(warp_order_);
}

inline void Machine::enter() {
    Machine &machine = current();
    Context::arrived(machine.scheduler_);
    machine.body_(machine.request_->args);
    Thread &thread = machine.thread();
    thread.state = Thread::finished;
    Warp &warp = machine.warp();
    warp.finished |= 1u << machine.lane();
    for (const auto &meeting : std::vector<std::shared_ptr<Meeting>>(warp.open)) machine.settle(warp, *meeting);
    machine.leave();
    __builtin_unreachable();
}

inline void Machine::leave() { Context::change(thread_->context, scheduler_); }

inline void Machine::run_block() {
    prepare_block();
    while (run_warps() && open_barrier()) {}
}

// Runs every warp until it can go no further; false ends the block.
inline bool Machine::run_warps() {
    if (request_->order == Order::random) {
        run_random_warps();
    } else {
        for (unsigned warp : warp_order_) {
            while (error_.empty() && run_warp(warps_[warp])) {}
        }
    }
    if (!error_.empty()) return false;
    return std::any_of(threads_.begin(), threads_.end(), [](const Thread &thread) { return thread.state != Thread::finished; });
}

inline void Machine::run_random_warps() {
    std::vector<unsigned> left(warp_order_);
    while (!left.empty() && error_.empty()) {
        const std::size_t pick = random() % left.size();
        if (!run_warp(warps_[left[pick]])) left.erase(left.begin() + static_cast<std::ptrdiff_t>(pick));
    }
}

// Runs each lane that may run once; false when none may.
inline bool Machine::run_warp(Warp &warp) {
    lane_order_.resize(warp.lanes);
    for (unsigned lane = 0; lane < warp.lanes; ++lane) lane_order_[lane] = lane;
    arrange(lane_order_);
    bool any = false;
    for (unsigned lane : lane_order_) {
        Thread &thread = threads_[warp.first + lane];
        if (thread.state != Thread::ready) continue;
        any = true;
        thread_ = &thread;
        Context::change(scheduler_, thread.context);
        if (!error_.empty()) return false;
    }
    return any;
}

// Lets the block through its barrier; an error when not every thread stands at the same one.
inline bool Machine::open_barrier() {
    const Site site = std::find_if(threads_.begin(), threads_.end(), [](const Thread &t) { return t.state != Thread::finished; })->site;
    for (const Thread &thread : threads_) {
        if (thread.state != Thread::at_barrier || !(thread.site == site)) {
            error_ = "divergence: " + stuck();
            return false;
        }
    }
    for (Thread &thread : threads_) thread.state = Thread::ready;
    votes_[++epoch_ % 2] = 0;
    return true;
}

inline unsigned Machine::barrier(bool vote, Site site) {
    unsigned &votes = votes_[epoch_ % 2];
    votes += vote ? 1 : 0;
    thread_->state = Thread::at_barrier;
    thread_->site = site;
    thread_->what = "__syncthreads";
    leave();
    return votes;
}

inline std::shared_ptr<Meeting> Machine::meet(const char *what, unsigned mask, const void *posted, std::size_t bytes, Site site) {
    Warp &own = warp();
    const unsigned bit = 1u << lane();
    if (!(mask & bit)) fail("%s at %s: the mask %#x leaves out its caller", what, site.text().c_str(), mask);
    auto found = std::find_if(own.open.begin(), own.open.end(), [&](const auto &open) { return open->mask & bit; });
    if (found == own.open.end()) {
        own.open.push_back(std::make_shared<Meeting>(what, site, mask));
        found = own.open.end() - 1;
    }
    const std::shared_ptr<Meeting> meeting = *found;
    if (meeting->mask != mask || meeting->what != what || !(meeting->site == site)) {
        fail("divergence: %s at %s with mask %#x while other lanes of the warp wait in %s at %s with mask %#x", what, site.text().c_str(),
             mask, meeting->what, meeting->site.text().c_str(), meeting->mask);
    }
    std::memcpy(meeting->posted[lane()], posted, bytes);
    meeting->arrived |= bit;
    settle(own, *meeting);
    if (!meeting->complete) {
        thread_->state = Thread::in_meeting;
        thread_->site = site;
        thread_->what = what;
        leave();
    }
    return meeting;
}

// Completes a meeting when all lanes of its mask that still run have come.
inline void Machine::settle(Warp &warp, Meeting &meeting) {
    if (meeting.complete || (meeting.mask & ~warp.finished & (warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1) & ~meeting.arrived)) return;
    meeting.complete = true;
    if (std::strcmp(meeting.what, "__syncwarp") == 0) ++warp.epoch;
    for (unsigned lane = 0; lane < warp.lanes; ++lane) {
        Thread &thread = threads_[warp.first + lane];
        if ((meeting.arrived >> lane & 1) && thread.state == Thread::in_meeting) thread.state = Thread::ready;
    }
    warp.open.erase(std::find_if(warp.open.begin(), warp.open.end(), [&](const auto &open) { return open.get() == &meeting; }));
}

inline std::string Machine::name(unsigned linear) const {
    const uint3 index = threads_[linear].index;
    return "thread (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// Who waits where, one example each.
inline std::string Machine::stuck() const {
    struct Place {
        std::string text;
        unsigned example, count;
    };
    std::vector<Place> places;
    for (const Thread &thread : threads_) {
        const bool done = thread.state == Thread::finished;
        const std::string text = done ? "ended" : std::string("waits in ") + thread.what + " at " + thread.site.text();
        const auto found = std::find_if(places.begin(), places.end(), [&](const Place &place) { return place.text == text; });
        if (found == places.end()) places.push_back({text, thread.linear, 1});
        else ++found->count;
    }
    std::string all;
    for (const Place &place : places) {
        if (!all.empty()) all += "; ";
        all += name(place.example) + (place.count > 1 ? " and " + std::to_string(place.count - 1) + " more: " : ": ") + place.text;
    }
    return all;
}

inline void Machine::fail(const char *format, ...) {
    char text[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof text, format, values);
    va_end(values);
    error_ = name(thread_->linear) + " of block (" + std::to_string(block_index_.x) + ", " + std::to_string(block_index_.y) + ", " +
             std::to_string(block_index_.z) + "): " + text;
    leave();
    __builtin_unreachable();
}

inline unsigned char *Machine::static_shared(const void *key, std::size_t bytes) {
    for (const Declared &declared : declared_) {
        if (declared.key == key) return shared_.get() + declared.at;
    }
    const std::size_t at = (static_bytes_ + 127) / 128 * 128;
    if (at + bytes > 48 * 1024) fail("more than 48 KiB of static shared memory; the rest must be dynamic");
    if (at + bytes + request_->shared_bytes > request_->shared_limit) fail("more shared memory than a block may have");
    std::memset(shared_.get() + at, 0xff, bytes);
    declared_.push_back({key, at, bytes});
    static_bytes_ = at + bytes;
    return shared_.get() + at;
}

inline void Machine::touch(const void *at, std::size_t bytes, Access access) {
    const auto offset = static_cast<std::size_t>(static_cast<const unsigned char *>(at) - shared_.get());
    const Conflict conflict = shadow_.note(offset, bytes, access, now());
    if (conflict.kind == Conflict::none) return;
    const bool dynamic = offset >= dynamic_at;
    const std::string other = conflict.kind == Conflict::unwritten ? "" : " " + name(conflict.other);
    fail("%s: %s%s (%s shared memory, byte %zu)", other.empty() ? "unwritten" : "race", conflict.text(access), other.c_str(),
         dynamic ? "dynamic" : "static", dynamic ? offset - dynamic_at : offset);
}

inline void Machine::copy_later(void *to, const void *from, std::size_t bytes, std::size_t valid) {
    Copy copy{static_cast<unsigned char *>(to), bytes, thread_->groups, {}};
    std::memset(copy.data, 0, sizeof copy.data);
    std::memcpy(copy.data, from, valid);
    touch(to, bytes, Access::write);
    std::memset(to, 0xff, bytes);  // what is there until it lands
    shadow_.promise(static_cast<std::size_t>(copy.to - shared_.get()), bytes, now());
    thread_->copies.push_back(copy);
}

// Lands all copies but those of the last `under_way` groups.
inline void Machine::wait_copies(unsigned under_way) {
    while (!thread_->copies.empty() && thread_->copies.front().group + under_way < thread_->groups) {
        const Copy &copy = thread_->copies.front();
        std::memcpy(copy.to, copy.data, copy.bytes);
        shadow_.land(static_cast<std::size_t>(copy.to - shared_.get()), copy.bytes, now());
        thread_->copies.pop_front();
    }
}

}  // namespace emulate
