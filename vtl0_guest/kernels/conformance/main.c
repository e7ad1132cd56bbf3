/* Runs the table and says what came of each row: "ROW name ok" or "ROW name FAIL ...", then "SUMMARY". */
#include "kernel.h"

enum { MAGIC = 0x434C5456 }; /* "VTLC" */

static void say_failure(const struct step *first)
{
    u64 number = 0;
    for (const struct step *step = first; step != failure.step && step->op != OP_END; step = next_step(step))
        number++;
    say(" FAIL step ");
    say_hex(number);
    say(" vtl ");
    say_hex(failure.step->vtl);
    say(" vp ");
    say_hex(failure.step->vp);
    say(": ");
    say(failure.what);
    if (failure.at) {
        say(" at ");
        say_hex(failure.at);
    }
    say(" want ");
    say_hex(failure.want);
    say(" got ");
    say_hex(failure.got);
    say("\n");
}

void main(void)
{
    struct cpu *cpu = &cpus[0][0];
    u32 done = 0, failed = 0;
    prepare_descriptors();
    if (*(u32 *)rows != MAGIC) {
        say("PANIC there is no table of rows in this image\n");
        finish(3);
    }
    prepare_level(cpu);
    say("CONFORMANCE begins\n");
    for (const struct step *row = (struct step *)(rows + 8); row->op == OP_ROW; done++) {
        const struct step *first = next_step(row);
        failure.set = 0;
        run_row(cpu, first);
        say("ROW ");
        say((const char *)row->data);
        if (failure.set) {
            failed++;
            say_failure(first);
        } else
            say(" ok\n");
        for (row = first; row->op != OP_ROW && row->op != OP_END; row = next_step(row))
            ;
    }
    say("SUMMARY rows ");
    say_hex(done);
    say(" failed ");
    say_hex(failed);
    say("\n");
    finish(failed ? 1 : 0);
}
