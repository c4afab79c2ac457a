// One CUDA thread as a fiber: its own stack, and a switch that costs a few loads.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATE_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATE_ADDRESS_SANITIZER 1
#endif
#endif
#if defined(EMULATE_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(EMULATE_UCONTEXT)
#define EMULATE_SWITCH 1
#endif

#if defined(EMULATE_SWITCH)
// Saves what a call must preserve on the old stack, and takes it from the new one.
extern "C" void emulate_switch(void **save, void *load);
asm(R"(
.text
.p2align 4
.globl emulate_switch
.hidden emulate_switch
.type emulate_switch, @function
emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulate_switch, .-emulate_switch
)");
#else
#include <ucontext.h>
#endif

namespace emulate {

// A stack with a page below it that cannot be touched.
class Stack {
public:
    static constexpr std::size_t size = 256 * 1024;

    Stack() : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
        void *at = mmap(nullptr, size + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        mprotect(at, page_, PROT_NONE);
        base_ = static_cast<char *>(at) + page_;
    }
    Stack(Stack &&other) noexcept : base_(std::exchange(other.base_, nullptr)), page_(other.page_) {}
    Stack(const Stack &) = delete;
    ~Stack() {
        if (!base_) return;
#if defined(EMULATE_ADDRESS_SANITIZER)
        ASAN_UNPOISON_MEMORY_REGION(base_, size);  // for whoever is given these addresses next
#endif
        munmap(base_ - page_, size + page_);
    }
    char *base() const { return base_; }

private:
    char *base_;
    std::size_t page_;
};

// Where a stack of execution stands while another runs.
class Context {
public:
    // Makes the context start in `entry`, which never returns, on `stack`.
    void start(const Stack &stack, void (*entry)()) {
        bottom_ = stack.base();
        size_ = Stack::size;
#if defined(EMULATE_ADDRESS_SANITIZER)
        // what ran here before may have been left in the middle
        ASAN_UNPOISON_MEMORY_REGION(bottom_, size_);
#endif
#if defined(EMULATE_SWITCH)
        auto *top = reinterpret_cast<void **>(stack.base() + Stack::size);
        *--top = nullptr;  // keeps the stack aligned as after a call
        *--top = reinterpret_cast<void *>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        pointer_ = top;
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack.base();
        context_.uc_stack.ss_size = Stack::size;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#endif
    }

    // Leaves `from` for `to`; returns when something switches back.
    static void change(Context &from, Context &to) {
#if defined(EMULATE_ADDRESS_SANITIZER)
        void *fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, to.bottom_, to.size_);
#endif
#if defined(EMULATE_SWITCH)
        emulate_switch(&from.pointer_, to.pointer_);
#else
        swapcontext(&from.context_, &to.context_);
#endif
#if defined(EMULATE_ADDRESS_SANITIZER)
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }

    // The first thing a started context does; `from` learns the bounds of the stack it was started on.
    static void arrived(Context &from) {
#if defined(EMULATE_ADDRESS_SANITIZER)
        __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.size_);
#else
        (void)from;
#endif
    }

private:
    const void *bottom_ = nullptr;
    std::size_t size_ = 0;
#if defined(EMULATE_SWITCH)
    void *pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
};

}  // namespace emulate
